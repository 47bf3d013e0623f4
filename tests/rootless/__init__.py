"""Run as an ordinary user, by tests/system/test_rootless.py: once with cgroups that are delegated to him, and once without."""

from __future__ import annotations

import os
from typing import Any

GIVEN = os.environ.get("JOBRUNNER_TEST_USER", "nothing")
MISSING = {
    "cgroups": (),
    "ids": (),
    "memory and pids": ("cpus", "read_bps", "write_bps"),
    "nothing": ("cpus", "memory", "read_bps", "write_bps"),
}[GIVEN]
"""What jobs must be allowed to lack. Not `pids`: a user namespace counts its tasks."""
CONFIG: dict[str, Any] = {"cgroup_parent": os.environ.get("JOBRUNNERD_CGROUP_PARENT", ""), "allow_missing": MISSING}
