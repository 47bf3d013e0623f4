"""What a test needs of its host. Without it the test is skipped, or, where JOBRUNNER_MUST_RUN is set, its module fails.

@requires("root", "cgroup1:memory")
def test_...

pytestmark = requires("root")
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from jobrunner.linux.disk import disks_under
from jobrunner.linux.mountinfo import cgroup_mounts

__all__ = ["requires"]


def _lacking(need: str) -> str:
    """Why this host does not have what is needed; empty if it does."""
    kind, _, name = need.partition(":")
    mounts = cgroup_mounts()
    match kind:
        case "root":
            return "" if os.geteuid() == 0 else "needs root"
        case "cgroup":
            return _lacking(f"cgroup1:{name}") and _lacking(f"cgroup2:{name}")
        case "cgroup1":
            return "" if name in mounts else f"needs a cgroup v1 hierarchy with {name}"
        case "cgroup2":
            offered = Path(mounts[""].point, "cgroup.controllers").read_text().split() if "" in mounts else None
            return "" if offered is not None and name in (*offered, "") else f"needs {name or 'a tree'} on cgroup v2"
        case "disk":
            found = any(disk.device for disk in disks_under([tempfile.gettempdir()]))
            return "" if found else "needs a temporary directory on a disk"
    raise ValueError(f"{need!r} is no need that is known")


def requires(*needs: str) -> pytest.MarkDecorator:
    """A mark for a test or a module. Needs: `root`, `disk`, `cgroup2`; `cgroup1:`, `cgroup2:` or, for any, `cgroup:CONTROLLER`."""
    reasons = [reason for reason in map(_lacking, needs) if reason]
    if reasons and os.environ.get("JOBRUNNER_MUST_RUN"):
        pytest.fail(f"JOBRUNNER_MUST_RUN is set: {'; '.join(reasons)}", pytrace=False)
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))
