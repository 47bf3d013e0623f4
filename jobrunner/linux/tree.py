"""Directory trees that a hostile job has made, taken over or removed by root after the job is gone.

Nothing is recursive and one directory is open at a time, so that a tree of any depth costs neither stack nor descriptors. No link
is followed and no path is looked up twice. Whoever made the tree is dead: nobody moves a directory while it is walked, and one that
was moved all the same is noticed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["remove_tree", "reown_tree", "tree_size"]

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def reown_tree(top: Path) -> None:
    """All of it becomes root's; set-user-ID bits go with that (chown(2)). FileNotFoundError if it is not there."""
    for directory, name, _ in _contents(top):
        os.chown(name, 0, 0, dir_fd=directory, follow_symlinks=False)
    os.chown(top, 0, 0, follow_symlinks=False)


def remove_tree(top: Path) -> None:
    """Remove it, if it is there. OSError for the first thing that cannot be removed."""
    with contextlib.suppress(FileNotFoundError):
        for directory, name, is_directory in _contents(top):
            (os.rmdir if is_directory else os.unlink)(name, dir_fd=directory)
        top.rmdir()


def tree_size(top: Path) -> int:
    """Bytes that it takes on disk; of a file with several names, as often as it is found."""
    return sum(os.stat(name, dir_fd=directory, follow_symlinks=False).st_blocks * 512 for directory, name, _ in _contents(top))


def _contents(top: Path) -> Iterator[tuple[int, str, bool]]:
    """(its open directory, name, whether it is a directory) of all below, each directory after what is in it."""
    here = os.open(top, DIRECTORY)
    try:
        device = os.fstat(here).st_dev
        below = [_directories(here)]  # of each level the names that are still to be entered
        entered: list[tuple[str, tuple[int, int]]] = []
        yield from _files(here)
        while below:
            if below[-1]:
                name = below[-1].pop()
                inner = os.open(name, DIRECTORY, dir_fd=here)
                if os.fstat(inner).st_dev != device:
                    os.close(inner)
                    raise OSError(f"{name!r} is on another file system")
                entered.append((name, _identity(here)))
                os.close(here)
                here = inner
                below.append(_directories(here))
                yield from _files(here)
            else:
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


def _identity(directory: int) -> tuple[int, int]:
    info = os.fstat(directory)
    return info.st_dev, info.st_ino


def _directories(directory: int) -> list[str]:
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _files(directory: int) -> Iterator[tuple[int, str, bool]]:
    """Names first: what is yielded is removed, and a directory that changes while it is read may skip some (readdir(3))."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)]
    for name in names:
        yield directory, name, False
