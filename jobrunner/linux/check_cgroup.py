"""Whether jobs can be limited here: a cgroup is made where a server would make its own, and each limit is applied in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jobrunner.errors import HostError
from jobrunner.job import Limits
from jobrunner.linux import disk, kernfs
from jobrunner.linux.above import BY_OTHERS
from jobrunner.linux.cgroup import CgroupHost, JobCgroup, detect
from jobrunner.linux.cgroup_none import NoCgroupHost
from jobrunner.linux.cgroup_v1 import BUFFERED
from jobrunner.linux.cgroup_v2 import SERVER_LEAF
from jobrunner.linux.check_user import no_cgroups
from jobrunner.linux.finding import Finding, Level, Needs, existing, from_error
from jobrunner.linux.kernfs import LimitNotApplied
from jobrunner.linux.mountinfo import CgroupMount, cgroup_mounts, own_cgroups

__all__ = ["cgroups", "limits_apply", "put_back"]

JOB_ID = "0" * 12
BASE = "jobrunner-check-"
"""And the number of this process."""
OF_CONTROLLER = {
    "cpu": ("cpus",),
    "memory": ("memory",),
    "pids": ("pids",),
    "io": ("read_bps", "write_bps", "read_iops", "write_iops"),
}
OF_V1 = {"io": "blkio"}
SAMPLE = Limits(cpus=1.0, memory=64 << 20, pids=64, read_bps=1 << 30, write_bps=1 << 30, read_iops=100_000, write_iops=100_000)
"""Applied where the configuration has no default: what a job may ask for."""

_V2 = "boot with systemd.unified_cgroup_hierarchy=1 (cgroup v2)"
_CONTROLLER = (
    "on the host: mkdir -p /sys/fs/cgroup/{0} && mount -t cgroup -o {0} cgroup /sys/fs/cgroup/{0} (for memory perhaps with "
    "cgroup_enable=memory on the kernel's command line), before the container is made; or name the limit in allow_missing"
)
_V2_CONTROLLER = (
    "systemd: Delegate=yes, and {0} in the cgroup.subtree_control of every cgroup above; where cgroup v1 holds it: boot with "
    "cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1; or name the limit in allow_missing"
)
_SWAP = "boot with swapaccount=1, or swapoff -a"
_ABOVE = (
    "a larger limit there (docker: --cpus, --memory, --pids-limit, systemd: CPUQuota=, MemoryMax=, TasksMax=), or smaller defaults"
)
_DISK = "put state_dir on a file system with a disk of its own (ext4, xfs), or name the limit in allow_missing"
_MASKED = "podman: --security-opt unmask=/sys/dev/block"
_OTHER_DISK = "let jobs write where state_dir is, whose disk is limited (docker: --read-only; compose: read_only: true)"


def cgroups(needs: Needs) -> list[Finding]:
    """A line for the tree, one for each controller, and what is not held in full."""
    with put_back() as parent:
        try:
            host = detect(needs.cgroup_parent or parent, f"{BASE}{os.getpid()}")
        except HostError as exc:
            return [from_error("cgroup", exc)]
        if isinstance(host, NoCgroupHost):
            return no_cgroups(host, needs)
        with contextlib.closing(host):
            _sweep(needs.cgroup_parent or parent)
            tree = Finding(Level.OK, "cgroup", f"{host.version}, can be written to")
            return [tree, *_controllers(host, needs), *_kill(host)]


def _sweep(parent: str) -> None:
    """Remove what checks that were killed have left: nobody was ever in it."""
    own = own_cgroups()
    for name, mount in cgroup_mounts().items():
        top = Path(mount.directory(parent or own.get(name, "/")))
        for base in top.glob(f"{BASE}*"):
            if not Path("/proc", base.name.removeprefix(BASE)).exists():
                kernfs.remove([*sorted(base.rglob("*/"), reverse=True), base])


def limits_apply(host: CgroupHost, needs: Needs) -> list[Finding]:
    """What is missing of the configured defaults, for a server that starts: what may be, and what no job starts without."""
    host.reopen(JOB_ID, {}).remove()  # of a server that was killed just here; nobody was ever in it
    try:
        cgroup = host.create(JOB_ID, needs.defaults, disk.disks_under([existing(needs.state_dir), "/"]), needs.allow_missing)
    except LimitNotApplied as exc:
        controller = next(name for name, limits in OF_CONTROLLER.items() if exc.limit in limits)
        return [_lacking(host, controller, exc)]
    except HostError as exc:
        return [from_error("cgroup", exc)]
    cgroup.remove()
    return [Finding(Level.LIMITED, "limits", what) for what in cgroup.missing]


def _controllers(host: CgroupHost, needs: Needs) -> Iterator[Finding]:
    disks = disk.disks_under([existing(needs.state_dir), "/"])
    for controller, names in OF_CONTROLLER.items():
        found = [_apply(host, needs, controller, name, disks) for name in names]
        worst = max((finding.level for finding in found), key=list(Level).index)
        whats = dict.fromkeys(what for finding in found if finding.level is worst for what in finding.what.split("; "))
        remedies = dict.fromkeys(remedy for finding in found if finding.level is worst for remedy in finding.remedy.split("; "))
        yield Finding(worst, f"cgroup {controller}", "; ".join(whats), "; ".join(remedies))


def _apply(host: CgroupHost, needs: Needs, controller: str, name: str, disks: list[disk.Disk]) -> Finding:
    """Apply one limit to a cgroup that no process is ever in."""
    default = getattr(needs.defaults, name)
    limits = Limits(**{name: getattr(SAMPLE, name) if default is None else default})
    title = f"cgroup {controller}"
    try:
        cgroup = host.create(JOB_ID, limits, disks, (), {name})
    except LimitNotApplied as exc:
        return _not_applied(host, controller, name, exc, needs, disks)
    except HostError as exc:
        return from_error(title, exc)
    try:
        return _partly(title, controller, cgroup, disks) or Finding(Level.OK, title, "its limits can be set")
    finally:
        cgroup.remove()


def _not_applied(
    host: CgroupHost, controller: str, name: str, exc: LimitNotApplied, needs: Needs, disks: list[disk.Disk]
) -> Finding:
    found = _lacking(host, controller, exc)
    if controller == "io" and not any(one.device for one in disks):
        # A default of disk I/O is not kept where there is no disk; every other one stops each job that starts.
        return replace(found, level=Level.LIMITED, remedy=_of_disk(disks))
    optional = name in needs.allow_missing or getattr(needs.defaults, name) is None
    return replace(found, level=Level.LIMITED) if optional else found


def _lacking(host: CgroupHost, controller: str, exc: LimitNotApplied) -> Finding:
    what, _, remedy = exc.message.partition("; ")
    if host.version == "v2" and what.endswith("controller is not there"):
        remedy = _V2_CONTROLLER.format(controller)
    return Finding(Level.MISSING, f"cgroup {controller}", what, remedy or _CONTROLLER.format(OF_V1.get(controller, controller)))


def _partly(title: str, controller: str, cgroup: JobCgroup, disks: list[disk.Disk]) -> Finding | None:
    """What the cgroup itself says that it does not hold."""
    if not cgroup.missing:
        return None
    remedies = dict.fromkeys(_remedy(what, controller, disks) for what in cgroup.missing)
    return Finding(Level.LIMITED, title, "; ".join(cgroup.missing), "; ".join(remedies))


def _remedy(what: str, controller: str, disks: list[disk.Disk]) -> str:
    if what.endswith(BY_OTHERS):
        return _ABOVE
    if what == BUFFERED:
        return _V2
    if controller == "memory":
        return _SWAP
    return _OTHER_DISK if disks[0].device else _of_disk(disks)  # the first is the state directory's


def _of_disk(disks: list[disk.Disk]) -> str:
    """podman hides /sys/dev/block, by which a disk's parts are told from the whole."""
    return _MASKED if "/sys/dev/block" in disks[0].reason else _DISK


def _kill(host: CgroupHost) -> Iterator[Finding]:
    try:
        cgroup = host.create(JOB_ID, Limits())
    except HostError:
        return
    try:
        unified = cgroup.paths.get("unified")
        if unified and Path(unified, "cgroup.kill").exists():
            yield Finding(Level.OK, "cgroup.kill", "is there")
        else:
            what = "not there: what is left behind by a helper that was killed is killed one by one"
            yield Finding(
                Level.LIMITED,
                "cgroup.kill",
                what,
                "Linux 5.14 or later, with cgroup2 mounted (on /sys/fs/cgroup/unified beside v1)",
            )
    finally:
        cgroup.remove()


@contextlib.contextmanager
def put_back() -> Iterator[str]:
    """Gives the cgroup that a server started here would use as parent, "" for its own; undoes afterwards what a host on v2 changes.

    There a process that hands controllers down moves into a leaf first; this one goes back, in this order: controllers that it
    enabled off again, itself, the leaf.
    """
    mounts, own = cgroup_mounts(), own_cgroups().get("", "/")
    if "" not in mounts or any(name in mounts for name in ("cpu", "memory", "pids")):
        yield ""
        return
    # Beside a server that runs (docker exec): that has moved into its leaf, and this process was put there with it.
    home = SERVER_LEAF.sub("", own) or "/"
    control = Path(mounts[""].directory(home)) / "cgroup.subtree_control"
    before = _words(control)
    try:
        yield home if home != own else ""
    finally:
        _undo(mounts[""], own, control, before)


def _undo(mount: CgroupMount, own: str, control: Path, before: set[str]) -> None:
    added = _words(control) - before
    if added:
        kernfs.write_if_there(control, " ".join(f"-{name}" for name in sorted(added)))
    now = own_cgroups().get("", own)
    if now != own:
        leaf = Path(mount.directory(now))
        kernfs.write_if_there(Path(mount.directory(own)) / "cgroup.procs", str(os.getpid()))
        kernfs.remove((leaf, leaf.parent / "jobs", leaf.parent))


def _words(path: Path) -> set[str]:
    try:
        return set(kernfs.read(path).split())
    except OSError:
        return set()
