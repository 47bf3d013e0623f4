"""`jobrunner`: the command line of a remote job executor.

main       the entry point: every failure becomes one line and its exit code
exitcodes  the table of exit codes
commands   the typer commands
certs      `jobrunner certs`
submit     the options of `start` and `run`, and the request that they make
typed      typer without its conversion of values
session    from the global options to an open client
follow     a job's output to this process's own, and `run`
writer     bytes to file descriptors, off the event loop
show       tables, JSON and sentences for people
"""
