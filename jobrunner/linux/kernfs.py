"""Small reads and writes of cgroup files, limits that are read back, and the end of a cgroup: what v1 and v2 have in common."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from jobrunner.errors import HostError
from jobrunner.job import Limits
from jobrunner.linux.user import in_user_namespace, is_root

__all__ = [
    "PERIOD",
    "LimitNotApplied",
    "Outcome",
    "can_enter",
    "has_swap",
    "kill_members",
    "lift_io",
    "make",
    "quota_of",
    "read",
    "remedy",
    "remove",
    "remove_soon",
    "same_pages",
    "set_and_check",
    "write",
    "write_if_there",
]

PERIOD = 100_000
"""Microseconds of a CPU limit's period: the kernel's default."""
MIN_QUOTA = 1000
MAX_PERIOD = 1_000_000
BATCH = 256
"""Processes signalled at once: a file descriptor each."""
ROUNDS = 16
PAGE = os.sysconf("SC_PAGE_SIZE")
REMEDY = (
    "the server needs a writable cgroup tree (start it with sudo; docker, podman: the image's own entrypoint, with --cap-add "
    "SYS_ADMIN --security-opt apparmor=unconfined; systemd: Delegate=yes)"
)
USER_REMEDY = (
    "start it where cgroups are delegated to this user: systemd-run --user --scope -p Delegate=yes jobrunnerd ... (for all "
    "controllers: docs/rootless.md), or as root, or let jobs lack what they then lack"
)
CONTAINER_REMEDY = (
    "docker, podman: not rootless; or podman on cgroup v2 with systemd, whose users have cgroups of their own; or let jobs lack "
    "what they then lack"
)
"""The last half sentence of both is followed by the setting."""


class LimitNotApplied(HostError):
    """The host does not keep a limit that a job was to have. `limit` is its name, as in `Limits`."""

    def __init__(self, limit: str, reason: str) -> None:
        super().__init__(f"cannot apply limit {limit}: {reason}")
        self.limit = limit
        self.reason = reason


class Outcome:
    """What came of a job's limits: collects what is missing and what the kernel says that it has, or raises."""

    def __init__(self, allow_missing: Collection[str], explicit: Collection[str]) -> None:
        self.missing: list[str] = []
        self._applied: dict[str, Any] = {}
        self._allowed = allow_missing
        self._explicit = explicit

    def not_applied(self, limit: str, reason: str, *, only_if_explicit: bool = False) -> None:
        """Raise LimitNotApplied, or note it where it may be missing; `only_if_explicit`: a default need not be kept."""
        if limit not in self._allowed and not (only_if_explicit and limit not in self._explicit):
            raise LimitNotApplied(limit, reason)
        self.missing.append(f"{limit}: not limited: {reason}")
        self._applied[limit] = None

    def attempt(self, limit: str, apply: Callable[[], float]) -> bool:
        """Apply one limit, which gives what it is then. An OSError, or what `set_and_check` finds, is the reason why it is not."""
        try:
            self._applied[limit] = apply()
        except OSError as exc:
            self.not_applied(limit, exc.strerror or str(exc))
            return False
        return True

    def applied(self, limits: Limits) -> Limits:
        """These, as the kernel has them; None for what is missing."""
        return replace(limits, **self._applied)


def remedy() -> str:
    """What to do where the tree cannot be written to."""
    if not is_root():
        return USER_REMEDY
    return CONTAINER_REMEDY if in_user_namespace() else REMEDY


def can_enter(own: str | Path, directory: Path) -> bool:
    """Whether processes of this cgroup may go to that one: who is not root must own the `cgroup.procs` above both (cgroups(7))."""
    return is_root() or os.access(Path(os.path.commonpath([own, directory]), "cgroup.procs"), os.W_OK)


def read(path: str | Path) -> str:
    """The text of a cgroup file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts).decode("ascii", "replace")
    finally:
        os.close(fd)


def write(path: str | Path, text: str, access: int = os.O_WRONLY) -> str:
    """Write a cgroup file, which takes a value in one write(2); with O_RDWR, gives its first 64 KiB after that.

    Raises OSError, whose strerror names the file.
    """
    try:
        fd = os.open(path, access | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
            return os.pread(fd, 65536, 0).decode("ascii", "replace") if access == os.O_RDWR else ""
        finally:
            os.close(fd)
    except OSError as exc:
        raise OSError(exc.errno, f"{path}: {text!r}: {os.strerror(exc.errno or 0)}") from exc


def write_if_there(path: str | Path, text: str) -> None:
    """Write what helps and is not promised: a kernel without it does without."""
    with contextlib.suppress(OSError):
        write(path, text)


def lift_io(path: str | Path) -> None:
    """Take every device's limit out of a `blkio.throttle.*_device` (v1) or `io.max`, as the shim does (lift.c)."""
    with contextlib.suppress(OSError):
        for line in read(path).splitlines():
            device = line.split()[0]
            write_if_there(path, f"{device} rbps=max wbps=max riops=max wiops=max" if "=" in line else f"{device} 0")


def set_and_check(path: str | Path, text: str, kept: Callable[[str], bool]) -> str:
    """Write a value, and give what is read back: a kernel that takes it and does something else is told as OSError too."""
    now = write(path, text, os.O_RDWR).strip()
    if not kept(now):
        raise OSError(0, f"{path}: {text!r} was written, and it is {now!r}")
    return now


def quota_of(cpus: float) -> tuple[int, int]:
    """A CPU limit as the kernel takes it, microseconds of each period: Documentation/scheduler/sched-bwc."""
    period = min(MAX_PERIOD, max(PERIOD, math.ceil(MIN_QUOTA / cpus)))
    return max(MIN_QUOTA, round(cpus * period)), period


def same_pages(size: int) -> Callable[[str], bool]:
    """Whether a memory limit reads back as this size, rounded down to whole pages as the kernel does."""
    return lambda text: text.strip().isdigit() and size - PAGE < int(text) <= size


def has_swap() -> bool:
    """Whether this host has any swap: /proc/swaps, whose first line is a heading (proc(5))."""
    return len(Path("/proc/swaps").read_text().splitlines()) > 1


def make(directory: Path, *, exist_ok: bool = False) -> None:
    """Make one directory, and those above it when they are not there. HostError if that cannot be."""
    try:
        try:
            directory.mkdir(exist_ok=exist_ok)
        except FileNotFoundError:
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(exist_ok=exist_ok)
    except OSError as exc:
        more = f"; {remedy()}" if exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else ""
        raise HostError(f"cannot make cgroup {directory}: {exc.strerror}{more}") from exc


def remove(directories: Iterable[Path]) -> bool:
    """Remove these directories, in this order; False if one is still there. One that is gone already is no error."""
    gone = True
    for directory in directories:
        try:
            directory.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            gone = False
    return gone


async def remove_soon(attempt: Callable[[], bool], timeout: float) -> bool:
    """Call `attempt` until it is True, for `timeout` seconds: a cgroup is busy for a moment after its last process.

    A loop with pauses, because v1 has no event for it.
    """
    deadline = time.monotonic() + timeout
    pause = 0.001
    while not attempt():
        if time.monotonic() >= deadline:
            return False
        await anyio.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True


def kill_members(procs: str | Path) -> None:
    """SIGKILL every process that a `cgroup.procs` lists, and those that appear meanwhile. Does not wait for their end."""
    done: set[int] = set()
    for _ in range(ROUNDS):
        fresh = _members(procs) - done
        if not fresh:
            return
        pending = sorted(fresh)
        for start in range(0, len(pending), BATCH):
            _kill(pending[start : start + BATCH], procs)
        done |= fresh


def _members(procs: str | Path) -> set[int]:
    try:
        return {int(pid) for pid in read(procs).split()} - {0}  # 0: a process of a PID namespace that is not seen from here
    except OSError:
        return set()


def _kill(pids: list[int], procs: str | Path) -> None:
    held: dict[int, int] = {}
    try:
        for pid in pids:
            try:
                held[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
        # Race: a number may have been a stranger's when its pidfd was opened. One that is a member now, after the opening, was
        # either that member then, or its pidfd is of a dead process and the signal goes nowhere.
        for pid in _members(procs) & held.keys():
            try:
                signal.pidfd_send_signal(held[pid], signal.SIGKILL)
            except ProcessLookupError:
                continue
    finally:
        for fd in held.values():
            os.close(fd)
