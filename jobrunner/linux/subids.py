"""Subordinate ids of the user that a server is (subuid(5), subgid(5)): a uid of its own for each job of a server that is not root.

The set-uid helpers newuidmap(1) and newgidmap(1) map them into a user namespace of the user's. What a job leaves on disk is another
uid's then, so it is taken over by a child in such a namespace, which is root to both ids there and to nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobrunner.identity import range_of
from jobrunner.linux.tree import reown_tree

__all__ = ["FILES", "SubIds", "granted", "of_jobs", "take_over"]

FILES = (Path("/etc/subuid"), Path("/etc/subgid"))
HELPERS = ("newuidmap", "newgidmap")
WHERE = "/usr/bin:/usr/sbin:/bin:/sbin:/usr/local/bin:/usr/local/sbin"
TIMEOUT = 10.0
"""Seconds for a helper; they may ask a directory service who the user is."""
SERVERS = 16
"""Parts of a range, one for each state directory, so that two servers of a user hardly ever give the same ids."""
LEAST = 4096
"""Ids of a part, if there are as many."""
CLONE_NEWUSER = 0x10000000


@dataclass(frozen=True, slots=True)
class SubIds:
    """Ids of the user's that are uids and gids both, and what maps them."""

    first: int
    count: int
    helpers: tuple[str, str]

    def part(self, first: int, count: int) -> SubIds:
        return SubIds(first, count, self.helpers)


def granted() -> SubIds:
    """The largest range that the user has, with helpers that work. LookupError says what lacks."""
    found = [shutil.which(name, path=WHERE) for name in HELPERS]
    uid_helper, gid_helper = found
    if uid_helper is None or gid_helper is None:
        raise LookupError(f"there is no {HELPERS[found.index(None)]}")
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise LookupError(f"uid {os.geteuid()} has no name in /etc/passwd") from None
    uids, gids = (list(_ranges(file, user)) for file in FILES)
    both = [(max(uid[0], gid[0]), min(sum(uid), sum(gid))) for uid in uids for gid in gids]
    first, end = max(both, key=lambda one: one[1] - one[0], default=(0, 0))
    if first >= end:
        lacking = [str(file) for file, ranges in zip(FILES, (uids, gids), strict=True) if not ranges]
        where = " and ".join(lacking)
        raise LookupError(
            f"{where}: no range of {user}'s" if lacking else f"no id of {user}'s is in both {FILES[0]} and {FILES[1]}"
        )
    return SubIds(first, end - first, (uid_helper, gid_helper))


def of_jobs(state_dir: Path, wanted: tuple[int, int]) -> SubIds:
    """Those of the jobs of this state directory, tried. `wanted` is job_uids of the configuration. LookupError says what lacks."""
    ids = granted()
    if wanted != range_of(state_dir):
        if not (ids.first <= wanted[0] and sum(wanted) <= ids.first + ids.count):
            there = f"{ids.first} to {ids.first + ids.count - 1}"
            raise LookupError(f"job_uids, {wanted[0]} to {sum(wanted) - 1}, are not all of this user's: {FILES[0]} has {there}")
        ids = ids.part(*wanted)
    else:
        size = max(ids.count // SERVERS, min(ids.count, LEAST))
        index = range_of(state_dir)[0] // range_of(state_dir)[1] % (ids.count // size)
        ids = ids.part(ids.first + index * size, size)
    _in_namespace(ids, None)
    return ids


def take_over(top: Path) -> None:
    """What a job has left below `top`, and `top`, becomes this user's, whichever of his subordinate ids had it.

    OSError; FileNotFoundError if it is not there.
    """
    if top.lstat().st_uid == os.geteuid():
        # `top` is the first to become his, so what is below may still be a job's: a child before this one was killed.
        with contextlib.suppress(PermissionError):
            reown_tree(top)
            return
    try:
        _in_namespace(granted(), top)
    except LookupError as exc:
        raise OSError(errno.EPERM, f"{exc}: its files are uid {top.lstat().st_uid}'s") from exc


def _ranges(file: Path, user: str) -> Iterator[tuple[int, int]]:
    """(first, count) of each of the user's lines, which name him or his uid."""
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        name, _, numbers = line.strip().partition(":")
        first, _, count = numbers.partition(":")
        if name in (user, str(os.geteuid())) and first.isdecimal() and count.isdecimal():
            yield int(first), int(count)


def _in_namespace(ids: SubIds, top: Path | None) -> None:
    """A child that is root of a user namespace with these ids takes `top` over, or does nothing. LookupError, OSError."""
    command = [sys.executable, "-P", "-m", __name__, *([] if top is None else [str(top)])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            told = child.stdout.readline()
            if told != "in\n":
                raise LookupError(f"no user namespace can be made: {told.strip()}")
            for helper, own in zip(ids.helpers, (os.geteuid(), os.getegid()), strict=True):
                _map(helper, child.pid, own, ids)
            child.stdin.write("mapped\n")
            child.stdin.flush()
            number, _, reason = child.stdout.readline().strip().partition(" ")
        except BaseException:
            child.kill()
            raise
    if number == "gone":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(top))
    if number != "done":
        raise OSError(int(number or 0), reason or "the child that takes it over was killed")


def _map(helper: str, pid: int, own: int, ids: SubIds) -> None:
    command = [helper, *map(str, (pid, 0, own, 1, ids.first, ids.first, ids.count))]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError) as exc:
        raise LookupError(f"{helper}: {exc}") from exc
    if done.returncode:
        raise LookupError(f"{helper}: {done.stderr.strip() or f'exit code {done.returncode}'}")


def _main(arguments: list[str]) -> None:
    """The child. It waits for its maps, and is 0 then (user_namespaces(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER) != 0:
        print(os.strerror(ctypes.get_errno()), flush=True)
        return
    print("in", flush=True)
    if not sys.stdin.readline():
        return
    try:
        os.setgroups([])  # a right that the namespace should give; Ubuntu's AppArmor makes some that give none
        for top in arguments:
            reown_tree(Path(top))
    except FileNotFoundError:
        print("gone", flush=True)
    except OSError as exc:
        print(exc.errno or 0, exc, flush=True)
    else:
        print("done", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
