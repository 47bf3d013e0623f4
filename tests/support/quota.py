"""What the kernel says of a file system's project quotas, beside jobrunner's own words for it (quotactl_fd(2))."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import NamedTuple

import anyio

from tests.support.timing import fail_after

__all__ = ["Record", "records", "until_left"]

GET_NEXT = (0x800009 << 8) | 2
"""Q_GETNEXTQUOTA of projects."""
NEXT = struct.Struct("=8Q2I")
"""struct if_nextdqblk."""


class Record(NamedTuple):
    """Of one project: bytes and files, those that there may be and those that there are."""

    most_bytes: int
    used_bytes: int
    most_files: int
    used_files: int


def records(mount: Path) -> dict[int, Record]:
    """By project, all that have a limit or a file, but project 0: what nobody gave one."""
    libc = ctypes.CDLL(None, use_errno=True)
    found: dict[int, Record] = {}
    directory = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    try:
        number = 1
        while True:
            buffer = ctypes.create_string_buffer(NEXT.size)
            if libc.syscall(443, directory, ctypes.c_int(GET_NEXT), ctypes.c_int(number), buffer) != 0:
                return found  # ENOENT: that was the last one
            hard, _, used, most_files, _, files, _, _, _, number = NEXT.unpack(buffer.raw)
            if hard or used or most_files or files:
                found[number] = Record(hard << 10, used, most_files, files)
            number += 1
    finally:
        os.close(directory)


async def until_left(mount: Path, count: int) -> None:
    """Wait until so many projects are left: xfs frees what was unlinked behind the caller's back, and tells nobody when."""
    with fail_after(10):
        while len(records(mount)) != count:  # noqa: ASYNC110
            await anyio.sleep(0.05)
