"""`python -m jobrunner_cli`."""

from jobrunner_cli.main import main

main()
