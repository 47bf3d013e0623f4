"""What the operator of this host tells a running server: the FIFO `ctl` in its state directory (docs/formats.md).

The same form as a shim's `ctl`, for the same reasons: whoever may write to the state directory may ask, no pid number is stored or
signalled, no port and no role are needed, opening it without a server gives ENXIO, and its hang-up tells that the server is gone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import stat
from collections.abc import Callable
from pathlib import Path

from jobrunner.errors import HostError
from jobrunner.job import is_job_id

__all__ = ["Control", "drain"]

logger = logging.getLogger(__name__)


class Control:
    """The server's end. Calls `drain` when it is asked to."""

    def __init__(self, state_dir: Path, drain: Callable[[], None]) -> None:
        """HostError if it cannot be made."""
        path = state_dir / "ctl"
        try:
            if os.path.lexists(path) and not stat.S_ISFIFO(path.lstat().st_mode):
                raise OSError(errno.EEXIST, f"{path} is no FIFO; remove it")
            if not path.exists():
                os.mkfifo(path, 0o600)
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            # Held for ever and never used: without a writer of our own each that leaves would hang up.
            self._keeper = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise HostError(f"cannot use state directory {state_dir}: {exc.strerror}") from exc
        self._drain = drain
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        os.close(self._keeper)

    def _read(self) -> None:
        for line in os.read(self._fd, 4096).splitlines():
            if line == b"drain":
                self._drain()
            else:
                logger.warning("what was asked for by ctl is not known: %r", line[:64])


def drain(state_dir: Path, tell: Callable[[str], None]) -> None:
    """Ask the server of this directory to drain, and wait until it is gone.

    HostError if there is none, or if it is gone and jobs run on, as after a crash.
    """
    try:
        fd = os.open(state_dir / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        why = "no server holds it" if exc.errno in (errno.ENXIO, errno.ENOENT) else exc.strerror
        raise HostError(f"cannot drain {state_dir}: {why}") from exc
    try:
        os.write(fd, b"drain\n")
        tell(f"draining: {running_jobs(state_dir)} jobs run; the server leaves when the last has ended")
        gone = select.poll()
        gone.register(fd, 0)  # poll(2): POLLERR when the reading end is closed
        gone.poll()
    finally:
        os.close(fd)
    left = running_jobs(state_dir)
    if left:
        raise HostError(f"cannot drain {state_dir}: the server has left, and {left} jobs run on")


def running_jobs(state_dir: Path) -> int:
    """How many jobs of this directory are not settled."""
    return sum(is_job_id(name) for name in os.listdir(state_dir / "running"))
