"""What a test may require of its host, by name: `pytest.mark.requires("root", "cgroup:memory")`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from jobrunner.linux.disk import disks_under
from jobrunner.linux.mountinfo import cgroup_mounts

__all__ = ["KINDS", "has"]


def _on_v1(controller: str) -> bool:
    return controller in cgroup_mounts()


def _on_v2(controller: str) -> bool:
    """Any, for no name."""
    mounts = cgroup_mounts()
    return "" in mounts and controller in ("", *Path(mounts[""].point, "cgroup.controllers").read_text().split())


def _history(revision: str) -> bool:
    found = ["git", "-C", str(Path(__file__).parent), "cat-file", "-e", f"{revision}^{{commit}}"]
    return subprocess.run(found, capture_output=True, check=False).returncode == 0


KINDS: Mapping[str, Callable[[str], bool]] = {
    "root": lambda _: os.geteuid() == 0,
    "disk": lambda _: any(disk.device for disk in disks_under([tempfile.gettempdir()])),
    "command": lambda name: shutil.which(name) is not None,
    "cgroup": lambda controller: _on_v1(controller) or _on_v2(controller),
    "cgroup1": _on_v1,
    "cgroup2": _on_v2,
    "history": _history,
}
"""`disk`: temporary files are on one. `cgroup:CONTROLLER`: on either version. `history:COMMIT`: the repository has it."""


def has(name: str) -> bool:
    """Whether this host has what is required: a kind, or KIND:NAME. KeyError for a kind that is none."""
    kind, _, detail = name.partition(":")
    return KINDS[kind](detail)
