"""The entry point of `jobrunner`: every failure becomes one line on standard error and its exit code, never a traceback."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from jobrunner.errors import InternalError, JobRunnerError
from jobrunner.stdio import PIPE_CLOSED, STDOUT, OutputClosed, Unbuffered, fill_descriptors
from jobrunner_cli.commands import app
from jobrunner_cli.exitcodes import INTERRUPTED, USAGE, exit_code
from jobrunner_cli.session import warn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "run"]


def main() -> None:
    """The console script."""
    fill_descriptors()
    sys.stdout = Unbuffered(STDOUT)
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
