"""The uids of jobs: each that runs has its own, which no other job has had for as long as the range allows.

The range is taken in a circle, so what a job has left behind under its uid is as old as can be when the next job gets that uid.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections import Counter
from pathlib import Path

from jobrunner.errors import LimitReached

__all__ = ["PROJECT_IDS", "Identities", "range_of", "split"]

UIDS = 0x70000000
"""Up to 0x7fffffff they are outside of passwd, of the ranges in subuid, and of what systemd takes (its UIDS-GIDS)."""
RANGES, RANGE = 4096, 65536

PROJECT_IDS = (0x70000000, 1 << 20)
"""First and count of the projects of work directories and workspaces, far from what container runtimes and kubelet take."""


def range_of(state_dir: Path) -> tuple[int, int]:
    """First and count of the uids for a state directory that is given none: two servers of one host hardly ever have the same."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(state_dir))).digest()
    return UIDS + int.from_bytes(digest[:4]) % RANGES * RANGE, RANGE


def split(first: int, count: int) -> tuple[int, int, int]:
    """Of a range of uids the one whose files are on disk that one job leaves to the next, and first and count of the jobs' own."""
    return (first, first + 1, count - 1) if count > 1 else (first, first, 1)


class Identities:
    """A range of uids, each also a gid."""

    def __init__(self, first: int, count: int, begin: int | None = None) -> None:
        """`begin` is the first to be taken, anywhere by default: who was last is not known after a restart."""
        self.first = first
        self.count = count
        self._taken: Counter[int] = Counter()
        self._next = first + secrets.randbelow(count) if begin is None else begin

    def __repr__(self) -> str:
        return f"<Identities {self.first}:{self.count} {len(self._taken)} taken>"

    def take(self) -> int:
        """A uid that nobody has. Raises LimitReached."""
        for _ in range(self.count):
            uid = self._next
            self._next = self.first + (uid + 1 - self.first) % self.count
            if uid not in self._taken:
                self.hold(uid)
                return uid
        raise LimitReached("start job", "job_uids", f"all {self.count} uids are of running jobs")

    def hold(self, uid: int) -> None:
        """This one is of a job that was found, or of files of one; it need not be of the range, which may have been another."""
        self._taken[uid] += 1

    def give_back(self, uid: int) -> None:
        """Nothing runs under it any more of one that had it, and nothing is left that belongs to it."""
        self._taken[uid] -= 1
        if self._taken[uid] <= 0:
            del self._taken[uid]
