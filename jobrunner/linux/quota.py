"""Project quotas of ext4 and xfs: directories that may take so much of the disk, and no more.

A project is a number that a file has beside its owner. What is made in a directory gets the directory's (FS_XFLAG_PROJINHERIT), and
the file system counts, and bounds, what all the files of a project take together. Who holds which number is written down nowhere
else: one that no file has is free. So nothing can disagree after a crash, and servers that share a file system share the numbers.

All of this may wait for the disk, so it is not for the event loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path

from jobrunner.errors import LimitReached
from jobrunner.identity import PROJECT_IDS
from jobrunner.linux.finding import existing
from jobrunner.linux.mountinfo import mount_of, read_mountinfo

__all__ = ["Projects"]

BYTES_PER_FILE = 16 << 10
"""As mkfs.ext4 makes them (inode_ratio, mke2fs.conf(5)): the same share of a disk's files as of its bytes."""
FEWEST_FILES = 1024
TRIES = 64
"""Numbers that are tried at random: where half are in use, one that is free is as good as certain."""

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
GET_ATTRIBUTES, SET_ATTRIBUTES = 0x801C581F, 0x401C5820
"""FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR: ioctl_xfs_fsgetxattr(2)."""
ATTRIBUTES = struct.Struct("=5I8x")
"""struct fsxattr: flags, two sizes of extents around a count, the project between them."""
INHERIT = 0x200
QUOTACTL_FD = 443
"""quotactl_fd(2), Linux 5.14; the same number on every architecture."""
PROJECT = 2
GET_STATE, GET_QUOTA, SET_QUOTA = (ord("X") << 8) + 8, 0x800007, 0x800008
"""Q_XGETQSTATV, Q_GETQUOTA, Q_SETQUOTA: quotactl(2)."""
STATE_SIZE = 160
STATE_VERSION = b"\1"
ENFORCED = 1 << 5
"""FS_QUOTA_PDQ_ENFD of its flags, at byte 2: without it projects are counted, and bounded by nothing."""
QUOTA = struct.Struct("=8QI4x")
"""struct if_dqblk: KiB hard and soft, bytes now, files hard and soft, files now, two times, which of them are valid."""
LIMITS_VALID = 1 | 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Projects:
    """The numbers that a server may give to directories on the file system of `place`."""

    def __init__(self, place: Path, first: int = PROJECT_IDS[0], count: int = PROJECT_IDS[1]) -> None:
        self.place = place
        self.first = first
        self.count = count
        self.lack = _lack(place, first)
        """Why no directory can be bounded there; empty if it can."""

    def __repr__(self) -> str:
        return f"<Projects {self.first}:{self.count} on {self.place}{f': {self.lack}' if self.lack else ''}>"

    def bound(self, directory: Path, size: int | None) -> None:
        """What is in it, and will be, takes `size` bytes at most; None lifts the bound. Raises OSError, LimitReached.

        It is empty, or was bounded before: what is there already is not looked for.
        """
        with _opened(directory) as fd:
            _set_limits(fd, self._project(fd) or self._give(fd), size)

    def has(self, directory: Path) -> bool:
        """Whether this directory was bounded once."""
        with _opened(directory) as fd:
            return self._project(fd) != 0

    def usage(self, directory: Path) -> int | None:
        """Bytes that it takes, at once however much is in it; None if they are not counted."""
        if self.lack:
            return None
        try:
            with _opened(directory) as fd:
                project = self._project(fd)
                return _quota(fd, project)[2] if project else None
        except OSError:
            return None

    @contextlib.contextmanager
    def removing(self, directory: Path) -> Iterator[None]:
        """Around its removal: the number is free once no file has it, and keeps no limits for whoever gets it next."""
        project = 0
        if not self.lack:
            with contextlib.suppress(OSError), _opened(directory) as fd:
                project = self._project(fd)
        yield
        if project and not os.path.lexists(directory):
            with contextlib.suppress(OSError), _opened(self.place) as fd:
                _set_limits(fd, project, None)

    def _project(self, fd: int) -> int:
        """Its number, if that is one of ours: an operator may have projects of his own, also around the state directory."""
        try:
            flags, _, _, project, _ = _attributes(fd)
        except OSError as exc:
            if exc.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
                return 0
            raise
        return project if flags & INHERIT and self.first <= project < self.first + self.count else 0

    def _give(self, fd: int) -> int:
        before = _attributes(fd)
        for _ in range(TRIES):
            project = self.first + secrets.randbelow(self.count)
            if _quota(fd, project)[5]:
                continue
            _set_project(fd, project, before[0] | INHERIT)
            # Race: another server may have taken it for another directory meanwhile. Whoever looks last sees both, and gives way.
            if _quota(fd, project)[5] == 1:
                return project
            _set_project(fd, before[3], before[0])
        raise LimitReached(
            "start job", "project_ids", f"no free one was found of {self.count} project ids; remove jobs or workspaces"
        )


def _lack(place: Path, project: int) -> str:
    there = Path(os.path.realpath(existing(place)))
    mount = mount_of(str(there), read_mountinfo())
    what = f"{place} is on {mount.fstype if mount else 'an unknown file system'}"
    state = bytearray(STATE_VERSION.ljust(STATE_SIZE, b"\0"))
    try:
        with _opened(there) as fd:
            _quotactl(fd, GET_STATE, 0, state)
    except OSError:  # ENOSYS: off, or unknown to the file system or the kernel; EINVAL: not of projects
        return f"{what} without project quotas"
    if not struct.unpack_from("=H", state, 2)[0] & ENFORCED:
        return f"{what}, which counts projects and bounds none"
    try:
        with _opened(there) as fd:
            _quota(fd, project)
    except OSError as exc:
        return f"{what} with project quotas, which cannot be set: {exc.strerror}"
    return ""


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _attributes(fd: int) -> tuple[int, ...]:
    return ATTRIBUTES.unpack(fcntl.ioctl(fd, GET_ATTRIBUTES, bytes(ATTRIBUTES.size)))


def _set_project(fd: int, project: int, flags: int) -> None:
    _, extent_size, _, _, cow_extent_size = _attributes(fd)
    fcntl.ioctl(fd, SET_ATTRIBUTES, ATTRIBUTES.pack(flags, extent_size, 0, project, cow_extent_size))


def _quota(fd: int, project: int) -> tuple[int, ...]:
    found = bytearray(QUOTA.size)
    try:
        _quotactl(fd, GET_QUOTA, project, found)
    except OSError as exc:
        if exc.errno != errno.ENOENT:  # xfs, of a project that nobody has
            raise
    return QUOTA.unpack(found)


def _set_limits(fd: int, project: int, size: int | None) -> None:
    files = 0 if size is None else max(size // BYTES_PER_FILE, FEWEST_FILES)
    kib = 0 if size is None else max(size >> 10, 1)  # 0 is no limit
    _quotactl(fd, SET_QUOTA, project, bytearray(QUOTA.pack(kib, 0, 0, files, 0, 0, 0, 0, LIMITS_VALID)))


def _quotactl(fd: int, command: int, project: int, buffer: bytearray) -> None:
    memory = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    number = ctypes.c_int((command << 8) | PROJECT)
    if _libc.syscall(ctypes.c_long(QUOTACTL_FD), ctypes.c_int(fd), number, ctypes.c_int(project), ctypes.byref(memory)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
