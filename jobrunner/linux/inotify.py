"""Waiting until something in a directory changes: one inotify instance per process (inotify(7)), for the readers of logs.

    watch = inotify.changed(directory)      # armed now
    ... read again: what came before the watch was armed is seen here ...
    await watch                             # done at the first change since

A watch fires once (IN_ONESHOT) and is shared by all who wait for its directory: however fast a job writes, a wait costs one event.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import struct
from collections.abc import Generator
from typing import Any

from jobrunner.errors import HostError

__all__ = ["Inotify", "Watch"]

IN_MODIFY, IN_MOVED_TO, IN_CREATE, IN_DELETE_SELF, IN_MOVE_SELF = 0x2, 0x80, 0x100, 0x400, 0x800
IN_Q_OVERFLOW = 0x4000
IN_ONLYDIR, IN_ONESHOT = 0x01000000, 0x80000000
MASK = IN_MODIFY | IN_MOVED_TO | IN_CREATE | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR | IN_ONESHOT
EVENT = struct.Struct("iIII")
"""wd, mask, cookie, and the length of the name that follows; native, as the kernel writes it."""
GONE_PAUSE = 0.1
"""Seconds until a watch on a directory that is not there fires: whoever then finds it still missing does not spin."""

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Done at the first change. May be awaited by many, cancelled by any of them without effect on the others, or dropped."""

    def __init__(self) -> None:
        self.done = False
        self._waiters: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        return f"<Watch {'done' if self.done else f'{len(self._waiters)} waiting'}>"

    def __await__(self) -> Generator[Any, None, None]:
        if self.done:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            yield from waiter
        finally:
            self._waiters.discard(waiter)

    def fire(self) -> None:
        self.done = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class Inotify:
    """The instance; belongs to the event loop that it was made on."""

    def __init__(self) -> None:
        """HostError if the user's instances are used up."""
        self._loop = asyncio.get_running_loop()
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise _error(
                "make an inotify instance", ctypes.get_errno(), "fs.inotify.max_user_instances, or the limit of open files"
            )
        self._watches: dict[int, Watch] = {}
        self._numbers: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._loop.add_reader(self._fd, self._read)

    def __repr__(self) -> str:
        return f"<Inotify fd {self._fd} {len(self._watches)} watches>"

    def changed(self, directory: str) -> Watch:
        """Arm a watch on a directory now. Await what it gives, after looking again.

        Its being removed or moved is a change too; it is done soon for one that is not there. HostError if no watch can be had.
        """
        number = self._numbers.get(directory)
        if number is not None:
            return self._watches[number]
        if self._fd < 0:
            raise HostError(f"cannot watch {directory}: the runner is closed")
        number = _libc.inotify_add_watch(self._fd, os.fsencode(directory), ctypes.c_uint32(MASK))
        if number < 0:
            return self._unwatched(directory, ctypes.get_errno())
        if number in self._watches:  # another name of the same directory
            return self._watches[number]
        self._watches[number] = watch = Watch()
        self._numbers[directory] = number
        self._names[number] = directory
        return watch

    def wake(self, directory: str) -> None:
        """Let everyone go who waits for this directory: something has changed that the kernel does not tell."""
        number = self._numbers.get(directory)
        if number is not None:
            _libc.inotify_rm_watch(self._fd, number)
            self._fire(number)

    def close(self) -> None:
        """Let everyone go. May be called twice."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        self._fire_all()

    def _unwatched(self, directory: str, code: int) -> Watch:
        if code not in (errno.ENOENT, errno.ENOTDIR):
            raise _error(f"watch {directory}", code, "fs.inotify.max_user_watches")
        watch = Watch()
        self._loop.call_later(GONE_PAUSE, watch.fire)
        return watch

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            number, mask, _, length = EVENT.unpack_from(data, at)
            at += EVENT.size + length
            if mask & IN_Q_OVERFLOW:
                self._fire_all()
            else:
                self._fire(number)  # the IN_IGNORED that follows a watch's only event finds it gone; numbers are not used again

    def _fire(self, number: int) -> None:
        watch = self._watches.pop(number, None)
        if watch is not None:
            del self._numbers[self._names.pop(number)]
            watch.fire()

    def _fire_all(self) -> None:
        for number in list(self._watches):
            self._fire(number)


def _error(what: str, code: int, setting: str) -> HostError:
    remedy = f"; raise the sysctl {setting}" if code in (errno.ENOSPC, errno.EMFILE) else ""
    return HostError(f"cannot {what}: {os.strerror(code)}{remedy}")
