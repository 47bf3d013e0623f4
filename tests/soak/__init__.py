"""What must hold for long and under abuse: `make soak`. Each round fails with an AssertionError that says what did not hold."""
