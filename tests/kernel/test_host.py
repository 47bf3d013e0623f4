"""Facts of this host, against what other tools say of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from jobrunner.linux.host import host_facts


def test_facts_are_the_hosts() -> None:
    facts = host_facts()
    said = subprocess.run(["uname", "-nrm"], capture_output=True, text=True, check=True).stdout.split()
    assert [facts.node, facts.kernel, facts.machine] == said
    assert facts.cpus == int(subprocess.run(["nproc"], capture_output=True, check=True).stdout)
    assert facts.memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + (1 << 20)
    assert facts.memory > 64 << 20
    kinds = {
        line.split(" - ")[1].split()[0] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup" in line
    }
    assert {"v1": {"cgroup"}, "hybrid": {"cgroup", "cgroup2"}, "v2": {"cgroup2"}, "": set()}[facts.cgroup_version] == kinds
    assert (facts.swap > 0) == (len(Path("/proc/swaps").read_text().splitlines()) > 1)
