"""The C helper, and its formats seen from Python: the item list, the launcher's report, the stop file, the exit record.

`main.c` opens with the theory of operation; docs/formats.md has the formats.
"""

from __future__ import annotations

from pathlib import Path

from jobrunner.errors import HostError

__all__ = ["binary_path"]


def binary_path() -> Path:
    """The compiled helper beside this file. HostError, with the remedy, if it is not there."""
    path = Path(__file__).with_name("jobrunner-shim")
    if not path.exists():
        raise HostError(f"cannot run jobs: {path} is missing; install jobrunner on Linux with a C compiler, or run `make shim`")
    return path
