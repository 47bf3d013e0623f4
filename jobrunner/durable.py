"""Files of a state directory: written so that a crash leaves them whole or not at all, and read without following or waiting.

All of it waits for the disk.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from jobrunner.record import RecordError

__all__ = ["append_durably", "read_file", "sync_directory", "write_durably", "write_temporary"]

MAX_FILE = 32 << 20
"""Bytes of a file that is read whole: job.json of the largest request (job.MAX_ARGS_TOTAL) is less, with every byte escaped."""


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is there whole or not at all: temporary file, fsync, rename, fsync of the directory."""
    write_temporary(path, data).rename(path)
    sync_directory(path.parent)


def write_temporary(path: Path, data: bytes) -> Path:
    """A file beside it with these bytes, synced: to be renamed to `path`."""
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(fd)
    finally:
        os.close(fd)
    return temporary


def append_durably(path: Path, lines: Iterable[bytes]) -> None:
    """Add whole lines to a file, synced, and its name if it is new; what could not be added in full is taken back."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    size = os.fstat(fd).st_size
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(b"".join(lines))
        os.fsync(fd)
        if size == 0:
            sync_directory(path.parent)
    except OSError:
        os.ftruncate(fd, size)
        raise
    finally:
        os.close(fd)


def read_file(path: Path, most: int = MAX_FILE) -> bytes:
    """The bytes of a regular file of ours. RecordError for anything else, which is not waited for, or more than `most`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENXIO, errno.ENOTDIR):
            raise RecordError("it is no regular file") from exc
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise RecordError("it is no regular file" if found.st_size <= most else f"it has {found.st_size} bytes")
        if found.st_uid != os.geteuid():
            raise RecordError(f"it belongs to uid {found.st_uid}")
        with open(fd, "rb", closefd=False) as file:
            return file.read(found.st_size)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """The names in it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
