"""File attributes (chattr(1)) that keep root itself from removing a file."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["chattr", "flags_lifted"]

LIFT = 'trap "" INT HUP TERM; read _; exec chattr -R -f -i -a "$0"'


def chattr(flag: str, path: Path) -> None:
    subprocess.run(["chattr", flag, path], check=True)


@contextmanager
def flags_lifted(directory: Path) -> Iterator[None]:
    """In the end nothing below is immutable or append-only, even if this process is killed.

    A child hears that its pipe has no writer any more.
    """
    with subprocess.Popen(["/bin/sh", "-c", LIFT, directory], stdin=subprocess.PIPE):
        yield
