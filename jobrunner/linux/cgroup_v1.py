"""Jobs' cgroups on v1 and hybrid hosts: one directory in each hierarchy, and in a hybrid host's v2 tree for its `cgroup.kill`.

The shim enters the CPU hierarchy alone, beside the job's processes and under the same limit, so that copying a flood of output is
paid for by the job; init enters all of them. The files: the kernel's Documentation/admin-guide/cgroup-v1 and
Documentation/scheduler/sched-bwc.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from jobrunner.errors import HostError
from jobrunner.job import Limits, Usage, is_job_id
from jobrunner.limits import MAX_IOPS
from jobrunner.linux import kernfs
from jobrunner.linux.above import above
from jobrunner.linux.counters import Counter, usage_of
from jobrunner.linux.disk import Disk
from jobrunner.linux.kernfs import PERIOD, Outcome, set_and_check, write_if_there
from jobrunner.linux.mountinfo import CONTROLLERS, CgroupMount, cgroup_version
from jobrunner.linux.user import is_root

__all__ = ["CgroupV1", "CgroupV1Host"]

UNIFIED = "unified"
SHIM, JOB = "shim", "job"
"""Below a job's directory in the CPU hierarchy, which has the limit of both: the shim's share is that of all the job's processes
together, or hundreds of them would keep it from its timers. JOB has the same limit again, to be read there."""
CPUSET = "cpuset"
"""A hierarchy that limits nothing here, and without which a JVM takes all others for broken: jobs see an empty cgroup of it."""
BUFFERED = "disk writes: cgroup v1 limits direct and synced writes only, buffered writes are not limited"
SWAP = "memory: swap is not limited, the kernel does not account it (boot with swapaccount=1)"


THROTTLES = ("read_bps", "write_bps", "read_iops", "write_iops")
NO_LIMITS = Limits()


class CgroupV1:
    """One job's directories, by controller; two that share a hierarchy have the same."""

    def __init__(
        self,
        directories: Mapping[str, Path],
        files: Collection[str],
        missing: tuple[str, ...] = (),
        cpuset: Path | None = None,
        throttles: Collection[str] = THROTTLES,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self.missing = missing
        self.limits = limits
        self._directories = directories
        self._cpuset = cpuset
        self._throttles = [directories["blkio"] / f"blkio.throttle.{name}_device" for name in throttles if "blkio" in directories]
        self._counters = _counters(directories, files)

    def __repr__(self) -> str:
        where = next(iter(self._directories.values()), None)
        return f"<CgroupV1 {where.name if where else '?'} in {' '.join(self._directories)}>"

    @property
    def paths(self) -> Mapping[str, str]:
        return {name: str(directory) for name, directory in self._directories.items()}

    def launch_items(self) -> list[tuple[str, str]]:
        items = []
        v1 = {name: directory for name, directory in self._directories.items() if name != UNIFIED}
        if "cpu" in v1:
            items.append(("cgroup1-shim", f"{v1['cpu'] / SHIM}/tasks"))
        places = [directory / JOB if directory == v1.get("cpu") else directory for directory in dict.fromkeys(v1.values())]
        items += [("cgroup1-job", f"{place}/tasks") for place in places]
        # What a job sees of them: each controller by its name, wherever it is mounted on the host.
        inside = {name: directory / JOB if directory == v1.get("cpu") else directory for name, directory in v1.items()}
        inside |= {CPUSET: self._cpuset} if self._cpuset is not None else {}
        items += [("cgroup-view", f"{name} {directory}") for name, directory in inside.items()]
        if UNIFIED in self._directories:
            items.append(("cgroup2-job", str(self._directories[UNIFIED])))
        if "cpu" in v1:
            items += [("cpu-quota", f"{directory}/cpu.cfs_quota_us") for directory in (v1["cpu"], v1["cpu"] / JOB)]
        items += [("io-limit", str(file)) for file in self._throttles if file.exists()]
        if "memory" in v1:
            items.append(("oom-control", f"{v1['memory']}/memory.oom_control"))
        return items + [counter.item() for counter in self._counters]

    def usage(self) -> Usage:
        now = [
            Counter(field, 1, "-", f"{self._directories[name]}/{file}") for field, name, file in _NOW if name in self._directories
        ]
        return usage_of([*self._counters, *now])

    def kill(self) -> None:
        # Order: no more forks, then the members; otherwise a fork bomb would outrun the loop.
        if "pids" in self._directories:
            write_if_there(self._directories["pids"] / "pids.max", "0")
        if UNIFIED in self._directories:
            write_if_there(self._directories[UNIFIED] / "cgroup.kill", "1")
        if "cpu" in self._directories:  # dying takes CPU time
            for place in (self._directories["cpu"] / JOB, self._directories["cpu"]):
                write_if_there(place / "cpu.cfs_quota_us", "-1")
        for file in self._throttles:  # and who waits for the disk takes no signal
            kernfs.lift_io(file)
        # Of init's hierarchies the first that is not also the shim's: a shim that lives has its job's end in hand.
        job = next((self._directories[name] for name in ("pids", "memory", "blkio", "cpuacct") if name in self._directories), None)
        if job is not None:
            kernfs.kill_members(job / "cgroup.procs")

    def remove(self) -> bool:
        parts = [self._directories["cpu"] / part for part in (SHIM, JOB)] if "cpu" in self._directories else []
        return kernfs.remove([*parts, *dict.fromkeys(self._directories.values())])

    async def removed(self, timeout: float = 5.0) -> bool:
        return await kernfs.remove_soon(self.remove, timeout)


_NOW = (("memory", "memory", "memory.usage_in_bytes"), ("pids", "pids", "pids.current"))


def _counters(directories: Mapping[str, Path], files: Collection[str]) -> list[Counter]:
    """The counters that this host has. `files` are the names of those that not every kernel has."""
    recursive = "_recursive" if "blkio.throttle.io_service_bytes_recursive" in files else ""
    if UNIFIED in directories and "cpu.stat" in files:  # exact; v1 counts user and system time by the tick
        cpu = [("cpu_user_ns", 1000, "user_usec", UNIFIED, "cpu.stat"), ("cpu_system_ns", 1000, "system_usec", UNIFIED, "cpu.stat")]
    elif "cpuacct.usage_user" in files:
        cpu = [("cpu_user_ns", 1, "-", "cpuacct", "cpuacct.usage_user"), ("cpu_system_ns", 1, "-", "cpuacct", "cpuacct.usage_sys")]
    else:  # USER_HZ is 100 on every architecture: time(7)
        cpu = [(f"cpu_{kind}_ns", 10_000_000, kind, "cpuacct", "cpuacct.stat") for kind in ("user", "system")]
    table = [
        *cpu,
        ("memory_peak", 1, "-", "memory", "memory.max_usage_in_bytes"),
        ("pids_peak", 1, "-", "pids", "pids.peak"),
        ("read_bytes", 1, "Read", "blkio", f"blkio.throttle.io_service_bytes{recursive}"),
        ("write_bytes", 1, "Write", "blkio", f"blkio.throttle.io_service_bytes{recursive}"),
        ("read_ops", 1, "Read", "blkio", f"blkio.throttle.io_serviced{recursive}"),
        ("write_ops", 1, "Write", "blkio", f"blkio.throttle.io_serviced{recursive}"),
        ("throttled_ns", 1, "throttled_time", "cpu", "cpu.stat"),
        ("oom_kills", 1, "oom_kill", "memory", "memory.oom_control"),
    ]
    return [
        Counter(field, scale, key, f"{directories[name]}/{file}") for field, scale, key, name, file in table if name in directories
    ]


_OPTIONAL = (
    (UNIFIED, "cpu.stat"),
    (UNIFIED, "cgroup.kill"),
    ("cpuacct", "cpuacct.usage_user"),
    ("memory", "memory.memsw.limit_in_bytes"),
    ("blkio", "blkio.throttle.io_service_bytes_recursive"),
)


class CgroupV1Host:
    """BASE in each hierarchy that jobs use."""

    def __init__(self, mounts: Mapping[str, CgroupMount], own: Mapping[str, str], parent: str, base_name: str) -> None:
        """Makes BASE. HostError if a hierarchy cannot be written to."""
        self.version = cgroup_version(mounts)
        names = {name: name for name in CONTROLLERS} | {UNIFIED: ""}
        self._jobs = {
            name: Path(mounts[key].directory(parent or own.get(key, "/"))) / base_name / "jobs"
            for name, key in names.items()
            if key in mounts
        }
        self._refused: dict[str, str] = {}
        self._cpuset: Path | None = None
        try:
            self._make_base()
            if CPUSET in mounts:
                self._make_seen(Path(mounts[CPUSET].directory(parent or own.get(CPUSET, "/"))) / base_name / "seen")
        except BaseException:
            self.close()
            raise
        if UNIFIED in self._jobs and not kernfs.can_enter(mounts[""].directory(own.get("", "/")), self._jobs[UNIFIED]):
            self._leave_out(UNIFIED)
        self._above = above(self._jobs)
        self._files = {file for name, file in _OPTIONAL if name in self._jobs and (self._jobs[name] / file).exists()}
        if "cgroup.kill" not in self._files and UNIFIED in self._jobs:
            self._leave_out(UNIFIED)

    def _make_base(self) -> None:
        """Who is not root does without the hierarchies that are not delegated to him, but not without all."""
        for name, directory in list(self._jobs.items()):
            try:
                kernfs.make(directory, exist_ok=True)
            except HostError as exc:
                if is_root():
                    raise
                self._refused[name] = exc.message
                del self._jobs[name]
        if not set(self._jobs) - {UNIFIED}:
            raise HostError(next(iter(self._refused.values())))

    def _make_seen(self, directory: Path) -> None:
        with contextlib.suppress(HostError):  # it may be nobody's to write to, as a container's
            kernfs.make(directory, exist_ok=True)
            self._cpuset = directory

    def _leave_out(self, name: str) -> None:
        jobs = self._jobs.pop(name)
        kernfs.remove((jobs, jobs.parent))

    def _lacks(self, controller: str) -> str:
        return self._refused.get(controller, f"no {controller} cgroup controller is mounted")

    def __repr__(self) -> str:
        return f"<CgroupV1Host {self.version} {' '.join(map(str, self._jobs.values()))}>"

    def create(
        self,
        job_id: str,
        limits: Limits,
        disks: Sequence[Disk] = (),
        allow_missing: Collection[str] = (),
        explicit: Collection[str] = (),
    ) -> CgroupV1:
        made: list[Path] = []
        try:
            for jobs in dict.fromkeys(self._jobs.values()):
                kernfs.make(place := jobs / job_id)
                made.insert(0, place)
            directories = self._directories(job_id)
            for part in (SHIM, JOB) if "cpu" in directories else ():
                kernfs.make(place := directories["cpu"] / part)
                made.insert(0, place)
            outcome = Outcome(allow_missing, explicit)
            self._limit_cpu(directories, limits, outcome)
            self._limit_memory(directories, limits, outcome)
            self._limit_pids(directories, limits, outcome)
            _limit_disks(directories.get("blkio"), self._lacks("blkio"), limits, disks, outcome)
            outcome.missing += self._above.notes(limits)
            applied = outcome.applied(limits)
            throttles = [name for name in THROTTLES if getattr(applied, name) is not None]
            return CgroupV1(directories, self._files, tuple(outcome.missing), self._cpuset, throttles, applied)
        except BaseException:
            kernfs.remove(made)
            raise

    def reopen(self, job_id: str, paths: Mapping[str, str]) -> CgroupV1:
        directories = {name: Path(path) for name, path in paths.items()} or self._directories(job_id)
        return CgroupV1(directories, self._files, cpuset=self._cpuset)

    def leftovers(self) -> list[str]:
        found = {entry.name for jobs in self._jobs.values() if jobs.is_dir() for entry in jobs.iterdir() if entry.is_dir()}
        return sorted(name for name in found if is_job_id(name))

    def close(self) -> None:
        for jobs in (*self._jobs.values(), *([self._cpuset] if self._cpuset is not None else [])):
            kernfs.remove((jobs, jobs.parent))

    def _directories(self, job_id: str) -> dict[str, Path]:
        return {name: jobs / job_id for name, jobs in self._jobs.items()}

    def _limit_cpu(self, directories: Mapping[str, Path], limits: Limits, outcome: Outcome) -> None:
        if limits.cpus is None:
            return
        if "cpu" not in directories:
            outcome.not_applied("cpus", self._lacks("cpu"))
            return
        outcome.attempt("cpus", partial(self._set_quota, directories["cpu"], limits.cpus))

    def _set_quota(self, directory: Path, cpus: float) -> float:
        quota, period = map(str, kernfs.quota_of(cpus))
        if period != str(PERIOD):
            set_and_check(f"{directory}/cpu.cfs_period_us", period, lambda text: text == period)
        try:
            set_and_check(f"{directory}/cpu.cfs_quota_us", quota, lambda text: text == quota)
        except OSError:
            # v1 refuses a quota above an ancestor's. Then the ancestor's is the tighter limit, and it holds.
            if self._above.cpus > cpus:
                raise
            return cpus
        # What a JVM, Node or Go goes by is read in the cgroup that it is in. What is left over may be used up later, as much as a
        # period has: so it never holds the job back before the limit itself does, which counts how long it did (Linux 5.14).
        files = {"cfs_period_us": period} if period != str(PERIOD) else {}  # each write is a walk over all cgroups
        for file, text in (files | {"cfs_quota_us": quota, "cfs_burst_us": quota}).items():
            write_if_there(directory / JOB / f"cpu.{file}", text)
        return int(quota) / int(period)

    def _limit_memory(self, directories: Mapping[str, Path], limits: Limits, outcome: Outcome) -> None:
        if limits.memory is None:
            return
        if "memory" not in directories:
            outcome.not_applied("memory", self._lacks("memory"))
            return
        outcome.attempt("memory", partial(self._set_memory, directories["memory"], limits.memory, outcome))

    def _set_memory(self, directory: Path, size: int, outcome: Outcome) -> int:
        now = int(set_and_check(f"{directory}/memory.limit_in_bytes", str(size), kernfs.same_pages(size)))
        # What TCP and UDP hold in the kernel is on an account of its own, and on none before it has a limit (cgroup-v1/memory.rst).
        write_if_there(f"{directory}/memory.kmem.tcp.limit_in_bytes", str(size))
        if "memory.memsw.limit_in_bytes" in self._files:  # memory and swap together, so the same limit leaves no swap
            set_and_check(f"{directory}/memory.memsw.limit_in_bytes", str(size), kernfs.same_pages(size))
            return now
        write_if_there(f"{directory}/memory.swappiness", "0")
        if kernfs.has_swap():
            outcome.missing.append(SWAP)
        return now

    def _limit_pids(self, directories: Mapping[str, Path], limits: Limits, outcome: Outcome) -> None:
        if limits.pids is None:
            return
        if "pids" not in directories:
            outcome.not_applied("pids", self._lacks("pids"))
            return
        text = str(limits.pids)
        file = f"{directories['pids']}/pids.max"
        outcome.attempt("pids", lambda: int(set_and_check(file, text, lambda now: now == text)))


def _limit_disks(directory: Path | None, lacks: str, limits: Limits, disks: Sequence[Disk], outcome: Outcome) -> None:
    wanted = {name: getattr(limits, name) for name in THROTTLES}
    devices = [disk.device for disk in disks if disk.device]
    applied = set()
    for name, value in wanted.items():
        if value is None:
            continue
        if directory is None:
            outcome.not_applied(name, lacks)
        elif not devices:
            reason = "; ".join(disk.reason for disk in disks) or "no disk is known"
            outcome.not_applied(name, reason, only_if_explicit=True)
        elif outcome.attempt(name, partial(_throttle, directory, name, value, devices)):
            applied.add(name)
    if applied & {"write_bps", "write_iops"}:
        outcome.missing.append(BUFFERED)
    if applied:
        outcome.missing += [f"disk I/O: not limited where {disk.reason}" for disk in disks if not disk.device and not disk.memory]
    elif directory is not None:
        for device in devices:  # the kernel counts a disk's I/O only once the throttle of that disk is in use; 0 is no limit
            write_if_there(f"{directory}/blkio.throttle.read_bps_device", f"{device} 0")


def _throttle(directory: Path, name: str, value: int, devices: Sequence[str]) -> int:
    value = min(value, MAX_IOPS) if name.endswith("iops") else value
    for device in devices:
        line = f"{device} {value}"
        set_and_check(f"{directory}/blkio.throttle.{name}_device", line, partial(_has_line, line))
    return value


def _has_line(line: str, text: str) -> bool:
    return line in text.splitlines()
