"""The standard descriptors of jobrunner's programs: kept apart from what they open, and written to in full or with an error.

Python's own streams keep what could not be written and try again when the process ends, which changes its exit code and prints
a traceback; and a descriptor that the caller closed is given to the next file or connection that is opened.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys

from jobrunner.errors import JobRunnerError

__all__ = ["PIPE_CLOSED", "STDERR", "STDOUT", "OutputClosed", "OutputFailed", "Unbuffered", "fill_descriptors", "write_all"]

STDOUT, STDERR = 1, 2
PIPE_CLOSED = 141
"""Exit code of a program whose standard output nobody reads any more: 128 + SIGPIPE, as of any other program in a pipe."""


class OutputClosed(Exception):
    """Whoever read this process's output is gone."""


class OutputFailed(JobRunnerError):
    """This process's own output cannot be written."""


class Unbuffered(io.TextIOBase):
    """In the place of `sys.stdout` or `sys.stderr`: what is written is out, or an error, at once.

    Standard output raises OutputClosed and OutputFailed; standard error never fails, for there is nobody left to tell.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def encoding(self) -> str:  # type: ignore[override]
        before = sys.__stdout__ if self._fd == STDOUT else sys.__stderr__
        return getattr(before, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, text: str) -> int:
        try:
            write_all(self._fd, text.encode(self.encoding, "backslashreplace"))
        except (OutputClosed, OutputFailed):
            if self._fd != STDERR:
                raise
        return len(text)


def fill_descriptors() -> None:
    """Keep a connection from becoming descriptor 1 where a caller closed it: output would be written into it.

    Opened the wrong way round, so that using one still fails with EBADF, as if it were closed.
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)


def write_all(fd: int, data: bytes) -> None:
    """write(2) until all of it is written, also to a pipe that another process made non-blocking.

    Raises OutputClosed when the reader is gone, OutputFailed for everything else.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            select.select((), (fd,), ())
        except OSError as exc:
            if exc.errno == errno.EPIPE:
                raise OutputClosed from exc
            name = "standard output" if fd == STDOUT else "standard error"
            raise OutputFailed(f"cannot write to {name}: {exc.strerror}") from exc
