"""The entry point of `jobrunner`: every failure becomes one line on standard error and its exit code, never a traceback."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import typer

from jobrunner.errors import InternalError, JobRunnerError
from jobrunner_cli.commands import app
from jobrunner_cli.exitcodes import INTERRUPTED, PIPE_CLOSED, USAGE, exit_code
from jobrunner_cli.session import warn
from jobrunner_cli.writer import OutputClosed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "run"]


def main() -> None:
    """The console script."""
    _fill_standard_descriptors()
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; only what typer prints as help goes by `sys.stdout`."""
    try:
        code = app(args, prog_name="jobrunner", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except JobRunnerError as exc:
        warn(exc.message)
        return exit_code(exc)
    except typer.TyperException as exc:
        # Typer's own words for a command line that cannot be understood.
        where = getattr(getattr(exc, "ctx", None), "command_path", "jobrunner")
        warn(f"{exc.format_message().rstrip('.')} (see `{where} --help`)")
        return USAGE
    except OutputClosed:
        return PIPE_CLOSED
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as exc:
        warn(f"internal error: {exc!r}")
        return exit_code(InternalError(str(exc)))


def _fill_standard_descriptors() -> None:
    """Keep a connection from becoming descriptor 1 where a caller closed it: a job's output would be written into it.

    Opened the wrong way round, so that using one still fails with EBADF, as if it were closed.
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)
