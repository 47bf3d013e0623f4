"""What the cgroups above the jobs' allow: less than a job's own limit, and it is all that the job can have.

A container's, a service's, a slice's. The kernel takes a larger limit of a job's all the same (v1 refuses one of CPU time), so it
has to be told. Read once, when the server starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from jobrunner.job import Limits
from jobrunner.linux import kernfs

__all__ = ["BY_OTHERS", "Above", "above"]

BY_OTHERS = "by a cgroup above them"
"""How each note ends."""

UNLIMITED = 1 << 62
"""v1 has no word for none: memory.limit_in_bytes is the largest number of pages then."""


@dataclass(frozen=True, slots=True)
class Above:
    """Infinite where there is no limit."""

    cpus: float = math.inf
    memory: float = math.inf
    pids: float = math.inf

    def notes(self, limits: Limits) -> list[str]:
        """One sentence for each of a job's limits that is out of reach."""
        wanted = ((name, getattr(limits, name), getattr(self, name)) for name in ("cpus", "memory", "pids"))
        return [
            f"{name}: {_text(value)} were asked for, and all jobs together have {_text(least)}, {BY_OTHERS}"
            for name, value, least in wanted
            if value is not None and value > least
        ]


def _text(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def above(directories: dict[str, Path]) -> Above:
    """By `cpu`, `memory` and `pids`: where the jobs of each hierarchy are. As far up as can be seen."""
    readers = {"cpu": ("cpus", _cpus), "memory": ("memory", _memory), "pids": ("pids", _pids)}
    found = {}
    for controller, directory in directories.items():
        if controller in readers:
            field, read = readers[controller]
            found[field] = min(map(read, _upwards(directory)), default=math.inf)
    return Above(**found)


def _upwards(directory: Path) -> list[Path]:
    """It and those above it that are cgroups."""
    return [one for one in (directory, *directory.parents) if (one / "cgroup.procs").exists()]


def _cpus(directory: Path) -> float:
    quota, period = (
        _words(directory / "cpu.max") or [_word(directory, "cpu.cfs_quota_us"), _word(directory, "cpu.cfs_period_us")]
    )[:2]
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf


def _memory(directory: Path) -> float:
    return _number(_word(directory, "memory.max") or _word(directory, "memory.limit_in_bytes"))


def _pids(directory: Path) -> float:
    return _number(_word(directory, "pids.max"))


def _number(text: str) -> float:
    return int(text) if text.isdigit() and int(text) < UNLIMITED else math.inf


def _word(directory: Path, file: str) -> str:
    return next(iter(_words(directory / file)), "")


def _words(path: Path) -> list[str]:
    try:
        return kernfs.read(path).split()
    except OSError:
        return []
