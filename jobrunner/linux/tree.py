"""Directory trees that a hostile job has made, taken over or removed by the server after the job is gone.

Nothing is recursive and no more than two directories are open, so that a tree of any depth costs neither stack nor
descriptors. Of what is in a directory some names are held at a time, however much there is. No link is followed and no path is
looked up twice. Whoever made the tree is dead, but a stranger may have been handed a directory of it (unix(7), SCM_RIGHTS): each
is closed to everybody else before its names are read, and one that was moved all the same is noticed.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from jobrunner.linux.user import is_root

__all__ = ["remove_tree", "reown_empty", "reown_tree", "tree_size"]

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
GET_FLAGS, SET_FLAGS = 0x80086601, 0x40086602
"""FS_IOC_GETFLAGS, FS_IOC_SETFLAGS: ioctl_iflags(2)."""
BATCH = 4096
"""Names of one directory that are held at a time, and as many more as the kernel gives at once (getdents64(2))."""
HELD = 0x10 | 0x20
"""Immutable, append-only: not even root removes such a file, or what is in such a directory."""


def reown_tree(top: Path) -> None:
    """All of it becomes the server's, and directories nobody else's; set-user-ID bits go with that (chown(2)).

    FileNotFoundError if it is not there.
    """
    owner = os.geteuid(), os.getegid()
    for directory, name, is_directory in _contents(top, unlock=True, enter=_close):
        if not is_directory:
            os.chown(name, *owner, dir_fd=directory, follow_symlinks=False)


def reown_empty(top: Path) -> bool:
    """The same of a directory with nothing in it, as most jobs leave theirs; False if there is more to do, or it cannot be done."""
    try:
        here = (_opened if is_root() else _unlocked)(top, None)
    except OSError:
        return False
    try:
        _close(here)
        with os.scandir(here) as entries:
            return next(entries, None) is None
    except OSError:
        return False
    finally:
        os.close(here)


def _close(directory: int) -> None:
    os.fchown(directory, os.geteuid(), os.getegid())
    os.fchmod(directory, 0o700)


def remove_tree(top: Path) -> None:
    """Remove it, if it is there. OSError for the first thing that cannot be removed."""
    with contextlib.suppress(FileNotFoundError):
        for directory, name, is_directory in _contents(top, unlock=True, removed=True):
            _remove(directory, name, is_directory)
        above = os.open(top.parent, DIRECTORY)
        try:
            _remove(above, top.name, True)
        finally:
            os.close(above)


def tree_size(top: Path) -> int:
    """Bytes that it takes on disk; of a file with several names, as often as it is found."""
    return sum(os.stat(name, dir_fd=directory, follow_symlinks=False).st_blocks * 512 for directory, name, _ in _contents(top))


def _remove(directory: int, name: str, is_directory: bool) -> None:
    remove = os.rmdir if is_directory else os.unlink
    try:
        remove(name, dir_fd=directory)
    except PermissionError:  # of what only root makes so
        _let_go(directory)
        kind = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if stat.S_ISREG(kind) or stat.S_ISDIR(kind):
            file = os.open(name, FILE, dir_fd=directory)
            try:
                _let_go(file)
            finally:
                os.close(file)
        remove(name, dir_fd=directory)


def _let_go(file: int) -> None:
    """Take the flags away that keep it; those that a file system does not know are none."""
    with contextlib.suppress(OSError):
        (flags,) = struct.unpack("@l", fcntl.ioctl(file, GET_FLAGS, bytes(8)))
        if flags & HELD:
            fcntl.ioctl(file, SET_FLAGS, struct.pack("@l", flags & ~HELD))


def _contents(
    top: Path, unlock: bool = False, removed: bool = False, enter: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[int, str, bool]]:
    """(its open directory, name, whether it is a directory) of all below, each directory after what is in it.

    `unlock`: also where the job has closed a directory to its owner, who is the server where that is not root. `enter` has each
    directory, `top` too, before its names are read. `removed`: each is gone when the next is asked for.
    """
    opened = _unlocked if unlock and not is_root() else _opened
    here = opened(top, None)
    try:
        enter(here)
        device = os.fstat(here).st_dev
        below = [_directories(here, 0)]  # of each level names that are still to be entered, and where there are more
        entered: list[tuple[str, tuple[int, int]]] = []
        yield from _files(here, removed)
        while below:
            names, more = below[-1]
            if not names and more is not None:
                below[-1] = names, more = _directories(here, 0 if removed else more)
            if names:
                name = names.pop()
                inner = opened(name, here)
                if os.fstat(inner).st_dev != device:
                    os.close(inner)
                    raise OSError(f"{name!r} is on another file system")
                entered.append((name, _identity(here)))
                os.close(here)
                here = inner
                enter(here)
                below.append(_directories(here, 0))
                yield from _files(here, removed)
            elif more is None:
                below.pop()
                if not entered:
                    return
                name, parent = entered.pop()
                above = os.open("..", DIRECTORY, dir_fd=here)
                os.close(here)
                here = above
                if _identity(here) != parent:
                    raise OSError(f"{name!r} was moved while its tree was walked")
                yield here, name, True
    finally:
        os.close(here)


def _opened(name: str | Path, above: int | None) -> int:
    return os.open(name, DIRECTORY, dir_fd=above)


def _unlocked(name: str | Path, above: int | None) -> int:
    """With all rights of its owner; by a descriptor that needs none of them (open(2), O_PATH)."""
    place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    try:
        if ~os.fstat(place).st_mode & stat.S_IRWXU:
            os.chmod(f"/proc/self/fd/{place}", stat.S_IRWXU)  # noqa: PTH101
        return os.open(".", DIRECTORY, dir_fd=place)
    finally:
        os.close(place)


def _identity(directory: int) -> tuple[int, int]:
    info = os.fstat(directory)
    return info.st_dev, info.st_ino


def _directories(directory: int, place: int) -> tuple[list[str], int | None]:
    """Names of directories in it from a place on, 0 for its beginning, and the place after them; None if there are no more.

    A place is what telldir(3) gives. It holds for who opens the directory again, as file servers do, while nothing is made in it.
    """
    names: list[str] = []
    os.lseek(directory, place, os.SEEK_SET)
    with os.scandir(directory) as entries:  # Order: a name was read before the place that its descriptor is at now
        for entry in entries:
            now = os.lseek(directory, 0, os.SEEK_CUR)
            if now != place and len(names) >= BATCH:
                return names, place
            place = now
            if entry.is_dir(follow_symlinks=False):
                names.append(entry.name)
    return names, None


def _files(directory: int, removed: bool) -> Iterator[tuple[int, str, bool]]:
    """A directory that loses names while it is read may skip some (readdir(3)), so it is read again until none is left."""
    while True:
        with os.scandir(directory) as entries:
            names = (entry.name for entry in entries if not entry.is_dir(follow_symlinks=False))
            if not removed:
                for name in names:
                    yield directory, name, False
                return
            batch = list(itertools.islice(names, BATCH))
        if not batch:
            return
        for name in batch:
            yield directory, name, False
