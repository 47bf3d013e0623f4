"""Limits of one job: what may be asked for, the server's defaults under it, and its ceilings above it. Sizes in bytes."""

from __future__ import annotations

import enum
import mmap
from dataclasses import dataclass, fields, replace

from jobrunner.errors import InvalidRequest

__all__ = ["MAX_IOPS", "Limits", "OutputPolicy", "check_number"]

MAX_SECONDS = 10 * 365 * 86400.0
MAX_SIZE = 1 << 62
MIN_MEMORY = 1 << 20
"""What a C program that does nothing and its pid 1 take, twice over."""
MIN_DIRECTORY, MAX_DIRECTORY = 1 << 16, 1 << 60
MAX_IOPS = (1 << 32) - 2
"""The kernel takes 32 bits of operations a second, and all ones for no limit."""
PAGE = mmap.PAGESIZE
FLOORS = {
    "read_bps": (4096, "a page in each second"),
    "write_bps": (4096, "a page in each second"),
    "read_iops": (2, "the least that cgroup v2 takes"),
    "write_iops": (2, "the least that cgroup v2 takes"),
    "open_files": (4, "the three standard ones, and one to load a program from"),
}
"""Below these a job can do nothing, or not every kernel takes them; why."""
MIN_OUTPUT = 1 << 16
"""The shim writes and drops in eighths of the limit, and no less than 4 KiB at once."""


class OutputPolicy(enum.StrEnum):
    """What happens when a job has written more than its output limit."""

    DROP_OLDEST = "drop-oldest"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one job; None means the server's default, and in a job's info: no such limit."""

    cpus: float | None = None
    """CPU time per wall time, 1.5 is one and a half processors."""
    memory: int | None = None
    """Bytes of memory, without swap."""
    pids: int | None = None
    """Tasks (processes and threads) at once, pid 1 of the job included."""
    read_bps: int | None = None
    write_bps: int | None = None
    read_iops: int | None = None
    write_iops: int | None = None
    open_files: int | None = None
    """Open file descriptors of one process (RLIMIT_NOFILE, getrlimit(2))."""
    tmp_size: int | None = None
    """Bytes of /tmp, and as many of /dev/shm; they are memory, so they count as the job's."""
    work_size: int | None = None
    """Bytes of /work, on disk where the file system has project quotas, otherwise in memory; None: on disk, and as large."""
    timeout: float | None = None
    """Seconds of wall time until the job is ended, reason `deadline`."""
    idle_timeout: float | None = None
    """Seconds without output until the job is ended, reason `idle_timeout`."""
    output_limit: int | None = None
    """Bytes of output kept on the server's disk, its index included."""
    output_policy: OutputPolicy | None = None

    def __post_init__(self) -> None:
        check_number("limits.cpus", self.cpus, 0.01, 4096.0)
        _check_count("limits.memory", self.memory, MIN_MEMORY, MAX_SIZE)
        _check_count("limits.pids", self.pids, 2, 1 << 22)
        for name in ("read_bps", "write_bps", "read_iops", "write_iops", "open_files"):
            _check_count(f"limits.{name}", getattr(self, name), 1, MAX_SIZE)
        for name in ("tmp_size", "work_size"):
            _check_count(f"limits.{name}", getattr(self, name), MIN_DIRECTORY, MAX_DIRECTORY)
        _check_count("limits.output_limit", self.output_limit, MIN_OUTPUT, MAX_SIZE)
        check_number("limits.timeout", self.timeout, 0.001, MAX_SECONDS)
        check_number("limits.idle_timeout", self.idle_timeout, 0.001, MAX_SECONDS)

    def over(self, defaults: Limits) -> Limits:
        """These limits, with the defaults' values wherever none is set here."""
        values = {f.name: getattr(defaults if getattr(self, f.name) is None else self, f.name) for f in fields(self)}
        return replace(self, **values)

    def for_kernel(self) -> Limits:
        """These limits in the kernel's numbers: sizes in whole pages, operations no more than it can count."""
        pages = {name: size // PAGE * PAGE for name in ("memory", "tmp_size", "work_size") if (size := getattr(self, name))}
        most = {name: min(rate, MAX_IOPS) for name in ("read_iops", "write_iops") if (rate := getattr(self, name))}
        return replace(self, **pages, **most)

    def check_floors(self) -> None:
        """Raise InvalidRequest for the first limit that leaves a job nothing. Records of older servers may have such a one."""
        for name, (least, why) in FLOORS.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidRequest(f"limits.{name}", f"{value} is below {least}, {why}")

    def check_ceilings(self, ceilings: Limits) -> None:
        """Raise InvalidRequest for the first limit that is above its ceiling, or unset where a ceiling is."""
        for f in fields(self):
            ceiling, value = getattr(ceilings, f.name), getattr(self, f.name)
            if ceiling is None or isinstance(ceiling, OutputPolicy):
                continue
            if value is None:
                raise InvalidRequest(f"limits.{f.name}", f"must be set, the server's ceiling is {ceiling}")
            if value > ceiling:
                raise InvalidRequest(f"limits.{f.name}", f"{value} is above the server's ceiling, {ceiling}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise InvalidRequest(name, f"{value!r} is not a number")
    if not low <= value <= high:
        raise InvalidRequest(name, f"{value} is not between {low} and {high}")


def _check_count(name: str, value: int | None, low: int, high: int) -> None:
    check_number(name, value, low, high)
    if value is not None and not isinstance(value, int):
        raise InvalidRequest(name, f"{value!r} is not a whole number")
