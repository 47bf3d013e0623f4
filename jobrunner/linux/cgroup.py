"""Cgroups of jobs: one protocol, and two implementations, `cgroup_v1` (v1 and hybrid hosts) and `cgroup_v2`.

Everything may be called on the event loop: it is mkdir, rmdir and small reads and writes of kernfs. No pid is written to
`cgroup.procs`, which waits for an RCU grace period: processes are born into their cgroup or enter it themselves.

    BASE = the server's own cgroup, or the configured parent, and below it a name of the state directory's own
    BASE/jobs/<id>        one directory for each hierarchy on v1; {shim, job} below it on v2
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from jobrunner.errors import HostError
from jobrunner.linux.cgroup_none import NoCgroupHost
from jobrunner.linux.mountinfo import cgroup_mounts, cgroup_version, own_cgroups
from jobrunner.linux.user import in_user_namespace, is_root

if TYPE_CHECKING:
    from jobrunner.job import Limits, Usage
    from jobrunner.linux.disk import Disk

__all__ = ["CgroupHost", "JobCgroup", "detect"]


class JobCgroup(Protocol):
    """One job's place in the tree, its limits applied."""

    @property
    def paths(self) -> Mapping[str, str]:
        """Directories by hierarchy, for job.json; enough for `CgroupHost.reopen`."""

    @property
    def limits(self) -> Limits:
        """Of `create`: the limits as the kernel has them, None for one that is missing."""

    @property
    def missing(self) -> tuple[str, ...]:
        """What is not limited, or not in full; one sentence each."""

    def launch_items(self) -> list[tuple[str, str]]:
        """Items for the shim's item list (docs/formats.md): where the shim and init go, `oom-control`, counters."""

    def usage(self) -> Usage:
        """What the job uses now, by the same counters that the shim is given."""

    def kill(self) -> None:
        """SIGKILL everything in it: the sweep after a dead shim. Does not wait."""

    def remove(self) -> bool:
        """Remove its directories; False if one is still busy, which it may be for a moment after the last process."""

    async def removed(self, timeout: float = 5.0) -> bool:
        """`remove`, again and again for `timeout` seconds; False if it is still busy then."""


class CgroupHost(Protocol):
    """This host's cgroup tree below BASE. Detected once."""

    @property
    def version(self) -> str:
        """`v1`, `hybrid` or `v2`; empty where jobs have none."""

    def create(
        self,
        job_id: str,
        limits: Limits,
        disks: Sequence[Disk] = (),
        allow_missing: Collection[str] = (),
        explicit: Collection[str] = (),
    ) -> JobCgroup:
        """Make a job's cgroup with these limits; when it fails, nothing is left of it.

        A limit that cannot be applied raises LimitNotApplied. Two exceptions, which `missing` tells: `allow_missing` names it;
        or it is of disk I/O, there is no disk, and it is a default (`explicit` has the names of the limits that the caller set).
        HostError if the tree cannot be used.
        """

    def reopen(self, job_id: str, paths: Mapping[str, str]) -> JobCgroup:
        """The cgroup of a job that a server before this one made; with no `paths`, the ones that `create` would make."""

    def leftovers(self) -> list[str]:
        """Ids of the jobs that have a directory below BASE."""

    def close(self) -> None:
        """Remove BASE if no job is left in it; it is made again when it is needed."""


def detect(parent: str, base_name: str) -> CgroupHost:
    """The host's cgroup tree. `parent`: a path in every hierarchy, "" for this process's own cgroup.

    HostError if there is none; for who is not the host's root, a host without: then it depends on what jobs may lack.
    """
    try:
        return _detect(parent, base_name)
    except HostError as exc:
        if is_root() and not in_user_namespace():
            raise
        return NoCgroupHost(exc.message.partition("; ")[0])


def _detect(parent: str, base_name: str) -> CgroupHost:
    from jobrunner.linux.cgroup_v1 import CgroupV1Host  # the implementations know the protocol, not the reverse
    from jobrunner.linux.cgroup_v2 import CgroupV2Host

    mounts = cgroup_mounts()
    own = own_cgroups()
    match cgroup_version(mounts):
        case "":
            raise HostError("cannot limit jobs: no cgroup file system is mounted; mount cgroup2 on /sys/fs/cgroup")
        case "v2":
            return CgroupV2Host(mounts[""], own.get("", "/"), parent, base_name)
        case _:
            return CgroupV1Host(mounts, own, parent, base_name)
