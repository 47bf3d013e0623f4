"""The machine that the figures are of."""

from __future__ import annotations

import os
import platform
import ssl
from pathlib import Path

from jobrunner.linux.host import host_facts
from jobrunner.linux.mountinfo import mount_of, read_mountinfo

__all__ = ["describe"]


def describe(state: Path, cgroup: str) -> dict[str, str | int | float]:
    """What matters for the figures; `busy` is the load average of the minute before, the benchmark's own not in it."""
    facts = host_facts()
    mount = mount_of(os.path.realpath(state), read_mountinfo())
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "processor": models[0] if models else facts.machine,
        "processors": facts.cpus,
        "memory": facts.memory,
        "kernel": facts.kernel,
        "cgroup": cgroup,
        "state_file_system": mount.fstype if mount else "",
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "busy": os.getloadavg()[0],
    }
