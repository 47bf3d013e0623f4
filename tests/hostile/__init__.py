"""Hostile jobs: real attacks from inside real jobs, and each with that one protection left out, where it succeeds."""
