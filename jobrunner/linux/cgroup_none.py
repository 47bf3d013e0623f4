"""Jobs without cgroups: a server that is not root, or root of a rootless container alone, and to whose user none are delegated.

No limit of a cgroup holds then, but one: a user namespace has its own count of each user's tasks, so RLIMIT_NPROC is the exact
limit of a job's (getrlimit(2), Linux 5.14). Nothing is left of a job whose shim was killed, because init dies with it and the rest
with init.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence

from jobrunner.job import Limits, Usage
from jobrunner.linux import kernfs
from jobrunner.linux.disk import Disk
from jobrunner.linux.kernfs import Outcome

__all__ = ["LIMITS", "NoCgroup", "NoCgroupHost"]

LIMITS = ("cpus", "memory", "pids", "read_bps", "write_bps", "read_iops", "write_iops")
OWN_TASK_COUNT = (5, 14)
NO_LIMITS = Limits()


class NoCgroup:
    """One job, not in any cgroup of its own."""

    paths: Mapping[str, str] = {}

    def __init__(self, pids: int | None = None, missing: tuple[str, ...] = (), limits: Limits = NO_LIMITS) -> None:
        self.missing = missing
        self.limits = limits
        self._pids = pids

    def __repr__(self) -> str:
        return "<NoCgroup>"

    def launch_items(self) -> list[tuple[str, str]]:
        return [] if self._pids is None else [("processes", str(self._pids))]

    def usage(self) -> Usage:
        return Usage()

    def kill(self) -> None:
        """There is nothing to sweep."""

    def remove(self) -> bool:
        return True

    async def removed(self, timeout: float = 5.0) -> bool:
        return True


class NoCgroupHost:
    """`why` there is none."""

    version = ""

    def __init__(self, why: str) -> None:
        self.why = why

    def __repr__(self) -> str:
        return f"<NoCgroupHost {self.why}>"

    def create(
        self,
        job_id: str,
        limits: Limits,
        disks: Sequence[Disk] = (),
        allow_missing: Collection[str] = (),
        explicit: Collection[str] = (),
    ) -> NoCgroup:
        pids = limits.pids if counts_tasks() else None
        wanted = [name for name in LIMITS if getattr(limits, name) is not None and not (name == "pids" and pids)]
        # All at once, so that nobody has to find them out one by one.
        needed = ", ".join(f'"{name}"' for name in wanted if name not in allow_missing)
        outcome = Outcome(allow_missing, explicit)
        for name in wanted:
            remedy = f"; {kernfs.remedy()}: allow_missing = [{needed}]" if needed else ""
            outcome.not_applied(name, self.why + remedy)
        return NoCgroup(pids, tuple(outcome.missing), outcome.applied(limits))

    def reopen(self, job_id: str, paths: Mapping[str, str]) -> NoCgroup:
        return NoCgroup()

    def leftovers(self) -> list[str]:
        return []

    def close(self) -> None:
        """There is nothing to remove."""


def counts_tasks() -> bool:
    """Whether RLIMIT_NPROC of a user namespace counts what is in it alone."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is not None and (int(found[1]), int(found[2])) >= OWN_TASK_COUNT
