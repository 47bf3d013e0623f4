"""Facts of this host, read once when they are asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from jobrunner.linux.mountinfo import cgroup_mounts, cgroup_version

__all__ = ["HostFacts", "host_facts"]


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a job may find here."""

    node: str
    kernel: str
    """As `uname -r` says it."""
    machine: str
    cpus: int
    """Processors that this process may run on (sched_getaffinity(2))."""
    memory: int
    """Bytes of RAM."""
    swap: int
    """Bytes."""
    cgroup_version: str
    """`v1`, `hybrid`, `v2`, or empty where there is none."""


def host_facts() -> HostFacts:
    """Read them. OSError where /proc is not mounted."""
    name = os.uname()
    words = {line.split(":")[0]: line.split() for line in Path("/proc/meminfo").read_text().splitlines()}
    memory, swap = (int(words[key][1]) * 1024 for key in ("MemTotal", "SwapTotal"))
    return HostFacts(
        name.nodename, name.release, name.machine, len(os.sched_getaffinity(0)), memory, swap, cgroup_version(cgroup_mounts())
    )
