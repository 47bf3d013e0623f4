"""Jobs' cgroups on v2 hosts, by the kernel's Documentation/admin-guide/cgroup-v2.

OWN                 where the server was started; subtree_control: all that is there of cpu memory pids io
└─ BASE             likewise
    ├─ server       the server itself, moved here once if OWN is not the root: a cgroup that hands out controllers holds no process
    └─ jobs         likewise
        └─ <id>     cpu.max, so that copying a flood of output is paid for by the job; subtree_control: cpu memory pids io
            ├─ shim half of that CPU time if it wants it, or hundreds of processes would keep it from its timers and from a stop
            └─ job  cpu.max again, to be read there; memory.max, memory.swap.max 0, memory.oom.group 1, pids.max, io.max
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from jobrunner.errors import HostError
from jobrunner.job import Limits, Usage, is_job_id
from jobrunner.limits import MAX_IOPS
from jobrunner.linux import kernfs
from jobrunner.linux.above import above
from jobrunner.linux.counters import Counter, usage_of
from jobrunner.linux.disk import Disk
from jobrunner.linux.kernfs import Outcome, set_and_check, write_if_there
from jobrunner.linux.mountinfo import CgroupMount

__all__ = ["CgroupV2", "CgroupV2Host"]

CONTROLLERS = ("cpu", "memory", "pids", "io")
NO_LIMITS = Limits()
IO_KEYS = {"read_bps": "rbps", "write_bps": "wbps", "read_iops": "riops", "write_iops": "wiops"}
SERVER_LEAF = re.compile(r"/jobrunner-[^/]+/server$")
"""Where a server that had to make room has moved to. One opened after it by the same process starts above that, not in it."""
SWAP = "memory: swap is not limited, the kernel does not account it (boot with swapaccount=1)"


class CgroupV2:
    """One job's directory with its two children."""

    def __init__(self, directory: Path, missing: tuple[str, ...] = (), limits: Limits = NO_LIMITS) -> None:
        self.missing = missing
        self.limits = limits
        self._top = directory
        self._shim = directory / "shim"
        self._job = directory / "job"
        self._quotas = (self._top / "cpu.max", self._job / "cpu.max")
        self._counters = [
            Counter("cpu_user_ns", 1000, "user_usec", f"{self._job}/cpu.stat"),
            Counter("cpu_system_ns", 1000, "system_usec", f"{self._job}/cpu.stat"),
            Counter("memory_peak", 1, "-", f"{self._job}/memory.peak"),
            Counter("pids_peak", 1, "-", f"{self._job}/pids.peak"),
            Counter("read_bytes", 1, "rbytes", f"{self._job}/io.stat"),
            Counter("write_bytes", 1, "wbytes", f"{self._job}/io.stat"),
            Counter("read_ops", 1, "rios", f"{self._job}/io.stat"),
            Counter("write_ops", 1, "wios", f"{self._job}/io.stat"),
            Counter("throttled_ns", 1000, "throttled_usec", f"{self._top}/cpu.stat"),
            Counter("oom_kills", 1, "oom_kill", f"{self._job}/memory.events"),
        ]

    def __repr__(self) -> str:
        return f"<CgroupV2 {self._top}>"

    @property
    def paths(self) -> Mapping[str, str]:
        return {"unified": str(self._top)}

    def launch_items(self) -> list[tuple[str, str]]:
        where = [("cgroup2-shim", str(self._shim)), ("cgroup2-job", str(self._job)), ("cgroup-view", f". {self._job}")]
        where += [("cpu-quota", str(file)) for file in self._quotas if file.exists()]
        if (self._job / "io.max").exists():
            where.append(("io-limit", str(self._job / "io.max")))
        if (self._job / "memory.events").exists():
            where.append(("oom-events", str(self._job / "memory.events")))
        return where + [counter.item() for counter in self._counters]

    def usage(self) -> Usage:
        now = [("memory", "memory.current"), ("pids", "pids.current")]
        return usage_of([*self._counters, *(Counter(field, 1, "-", f"{self._job}/{file}") for field, file in now)])

    def kill(self) -> None:
        for file in self._quotas:  # dying takes CPU time
            write_if_there(file, "max")
        kernfs.lift_io(self._job / "io.max")  # and who waits for the disk takes no signal
        if (self._job / "cgroup.kill").exists():
            write_if_there(self._job / "cgroup.kill", "1")
            return
        write_if_there(self._job / "pids.max", "0")  # before Linux 5.14; no more forks, then the members
        kernfs.kill_members(self._job / "cgroup.procs")

    def remove(self) -> bool:
        return kernfs.remove((self._job, self._shim, self._top))

    async def removed(self, timeout: float = 5.0) -> bool:
        return await kernfs.remove_soon(self.remove, timeout)


class CgroupV2Host:
    """BASE, and the controllers that the host lets it have."""

    version = "v2"

    def __init__(self, mount: CgroupMount, own: str, parent: str, base_name: str) -> None:
        """Makes BASE and hands the controllers down to it. HostError, with the remedy, if the tree cannot be written to."""
        top = Path(mount.directory(parent or SERVER_LEAF.sub("", own) or "/"))
        base = top / base_name
        self._jobs = base / "jobs"
        kernfs.make(self._jobs, exist_ok=True)
        if not kernfs.can_enter(mount.directory(own), self._jobs):
            self.close()
            raise HostError(f"cannot use cgroup {top}: this user may not move processes there from {own}; {kernfs.remedy()}")
        self._above = above(dict.fromkeys(CONTROLLERS, self._jobs))
        try:
            offered = kernfs.read(top / "cgroup.controllers").split()
            self._controllers = tuple(name for name in CONTROLLERS if name in offered)
            _hand_down_from(top, base, self._controllers)
            for directory in (base, self._jobs):
                _hand_down(directory, self._controllers)
        except OSError as exc:
            self.close()
            raise HostError(f"cannot hand down cgroup controllers: {exc.strerror}; {kernfs.remedy()}") from exc

    def __repr__(self) -> str:
        return f"<CgroupV2Host {self._jobs} {' '.join(self._controllers)}>"

    def create(
        self,
        job_id: str,
        limits: Limits,
        disks: Sequence[Disk] = (),
        allow_missing: Collection[str] = (),
        explicit: Collection[str] = (),
    ) -> CgroupV2:
        top = self._jobs / job_id
        made: list[Path] = []
        try:
            for directory in (top, top / "shim", top / "job"):
                kernfs.make(directory)
                made.insert(0, directory)
            try:
                _hand_down(top, self._controllers)
            except OSError as exc:
                raise HostError(f"cannot hand down cgroup controllers: {exc.strerror}; {kernfs.remedy()}") from exc
            outcome = Outcome(allow_missing, explicit)
            self._limit(top, limits, outcome)
            self._limit_disks(top / "job", limits, disks, outcome)
            outcome.missing += self._above.notes(limits)
            return CgroupV2(top, tuple(outcome.missing), outcome.applied(limits))
        except BaseException:
            kernfs.remove(made)
            raise

    def reopen(self, job_id: str, paths: Mapping[str, str]) -> CgroupV2:
        return CgroupV2(Path(paths.get("unified") or self._jobs / job_id))

    def leftovers(self) -> list[str]:
        return sorted(entry.name for entry in self._jobs.iterdir() if entry.is_dir() and is_job_id(entry.name))

    def close(self) -> None:
        kernfs.remove((self._jobs, self._jobs.parent))

    def _limit(self, top: Path, limits: Limits, outcome: Outcome) -> None:
        wanted = (
            ("cpus", "cpu", limits.cpus, lambda cpus: _set_cpu(top, cpus)),
            ("memory", "memory", limits.memory, lambda size: _set_memory(top / "job", size, outcome)),
            ("pids", "pids", limits.pids, lambda most: _set_pids(top / "job", most)),
        )
        for limit, controller, value, apply in wanted:
            if value is not None and controller in self._controllers:
                outcome.attempt(limit, partial(apply, value))
            elif value is not None:
                outcome.not_applied(limit, f"the {controller} cgroup controller is not there; {kernfs.remedy()}")

    def _limit_disks(self, job: Path, limits: Limits, disks: Sequence[Disk], outcome: Outcome) -> None:
        devices = [disk.device for disk in disks if disk.device]
        applied = False
        for limit, key in IO_KEYS.items():
            value = getattr(limits, limit)
            if value is None:
                continue
            if "io" not in self._controllers:
                outcome.not_applied(limit, f"the io cgroup controller is not there; {kernfs.remedy()}")
            elif not devices:
                reason = "; ".join(disk.reason for disk in disks) or "no disk is known"
                outcome.not_applied(limit, reason, only_if_explicit=True)
            else:
                applied |= outcome.attempt(limit, partial(_set_io, job, key, value, devices))
        if applied:
            outcome.missing += [
                f"disk I/O: not limited where {disk.reason}" for disk in disks if not disk.device and not disk.memory
            ]


def _hand_down(directory: Path, controllers: Iterable[str]) -> None:
    """Let the children of a cgroup have controllers; those that they have already stay. Raises OSError."""
    file = directory / "cgroup.subtree_control"
    lacking = set(controllers) - set(kernfs.read(file).split())
    if lacking:
        kernfs.write(file, " ".join(f"+{name}" for name in sorted(lacking)))


def _hand_down_from(top: Path, base: Path, controllers: Iterable[str]) -> None:
    """The same from the server's own cgroup, which must hold no process for that unless it is the root: move out of it, once."""
    try:
        _hand_down(top, controllers)
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise
        kernfs.make(base / "server", exist_ok=True)
        kernfs.write(base / "server" / "cgroup.procs", "0")
        try:
            _hand_down(top, controllers)
        except OSError as again:
            reason = (
                "other processes are in it; start the server in a cgroup of its own: systemd-run --scope -p Delegate=yes "
                "jobrunnerd ...; systemd unit: Delegate=yes"
            )
            raise HostError(f"cannot hand down cgroup controllers from {top}: {reason}") from again


def _set_cpu(top: Path, cpus: float) -> float:
    quota, period = kernfs.quota_of(cpus)
    text = f"{quota} {period}"
    set_and_check(top / "cpu.max", text, lambda now: now == text)
    # What a JVM, Node or Go goes by is read in the cgroup that it is in. What is left over may be used up later, as much as a
    # period has: so it never holds the job back before the limit itself does, which counts how long it did (Linux 5.14).
    write_if_there(top / "job" / "cpu.max", text)
    write_if_there(top / "job" / "cpu.max.burst", str(quota))
    return quota / period


def _set_memory(job: Path, size: int, outcome: Outcome) -> int:
    now = int(set_and_check(job / "memory.max", str(size), kernfs.same_pages(size)))
    write_if_there(job / "memory.oom.group", "1")
    if (job / "memory.swap.max").exists():
        set_and_check(job / "memory.swap.max", "0", lambda text: text == "0")
    elif kernfs.has_swap():
        outcome.missing.append(SWAP)
    return now


def _set_pids(job: Path, most: int) -> int:
    return int(set_and_check(job / "pids.max", str(most), lambda now: now == str(most)))


def _set_io(job: Path, key: str, value: int, devices: Sequence[str]) -> int:
    value = min(value, MAX_IOPS) if key.endswith("iops") else value
    word = f"{key}={value}"
    for device in devices:
        set_and_check(job / "io.max", f"{device} {word}", partial(_has_word, device, word))
    return value


def _has_word(device: str, word: str, text: str) -> bool:
    return any(line.split()[:1] == [device] and word in line.split() for line in text.splitlines())
