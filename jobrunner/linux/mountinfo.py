"""/proc/self/mountinfo and /proc/self/cgroup (proc_pid_mountinfo(5), cgroups(7)), parsed."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CONTROLLERS",
    "CgroupMount",
    "Mount",
    "cgroup_mounts",
    "cgroup_version",
    "mount_of",
    "own_cgroups",
    "parse_mountinfo",
    "read_mountinfo",
]

CONTROLLERS = ("cpu", "cpuacct", "memory", "pids", "blkio")
"""Of v1, those that jobs use."""
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    device: str
    """MAJOR:MINOR; major 0 is no device's."""
    root: str
    """The directory of the file system that is mounted."""
    point: str
    fstype: str
    source: str
    options: tuple[str, ...]
    """Of the file system (super options)."""

    def option(self, name: str) -> str | None:
        """The value of `name=value`."""
        return next((option[len(name) + 1 :] for option in self.options if option.startswith(f"{name}=")), None)


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """A cgroup hierarchy: where it is mounted, and which of its directories that is."""

    point: str
    root: str

    def directory(self, path: str) -> str:
        """The directory of the cgroup `path`, a path as /proc/self/cgroup has it."""
        below = os.path.relpath(path, self.root)
        # A path outside of the mount is that of another cgroup namespace; what is mounted is then the best that is known.
        return self.point if below == "." or below.startswith("..") else f"{self.point}/{below}"


@functools.lru_cache(maxsize=2)  # asked at each start, and hardly ever another
def parse_mountinfo(raw: bytes) -> tuple[Mount, ...]:
    """The mounts, in order; lines that are none are skipped."""
    mounts = []
    for line in raw.splitlines():
        left, separator, right = line.partition(b" - ")
        fields, tail = left.split(b" "), right.split(b" ")
        if separator and len(fields) >= 6 and len(tail) >= 3:
            device, root, point, fstype, source = map(_text, (*fields[2:5], *tail[:2]))
            mounts.append(Mount(device, root, point, fstype, source, tuple(_text(tail[2]).split(","))))
    return tuple(mounts)


def _text(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def read_mountinfo() -> Sequence[Mount]:
    """The mounts of this process."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())


def mount_of(path: str, mounts: Sequence[Mount]) -> Mount | None:
    """The mount that a path without symbolic links is on."""
    best: Mount | None = None
    for mount in mounts:
        prefix = mount.point.rstrip("/")
        if (path == prefix or path.startswith(f"{prefix}/")) and (best is None or len(mount.point) >= len(best.point)):
            best = mount  # the later of two on one point hides the earlier
    return best


def cgroup_mounts(mounts: Sequence[Mount] | None = None) -> dict[str, CgroupMount]:
    """Cgroup hierarchies by controller, `name=...` for a named one, "" for v2. The first mount of each counts.

    Of this process's mounts those that can be seen: another one over /sys, say, hides them, and is no place to make cgroups in.
    """
    found: dict[str, CgroupMount] = {}
    for mount in read_mountinfo() if mounts is None else mounts:
        if mount.fstype in ("cgroup", "cgroup2") and (mounts is not None or Path(mount.point, "cgroup.procs").exists()):
            for name in mount.options if mount.fstype == "cgroup" else ("",):
                found.setdefault(name, CgroupMount(mount.point, mount.root))
    return found


def cgroup_version(mounts: Mapping[str, CgroupMount]) -> str:
    """`v1`, `hybrid` (v1 controllers, and a v2 tree beside them), `v2`, or "" where no cgroup file system is mounted."""
    if any(name in mounts for name in CONTROLLERS):
        return "hybrid" if "" in mounts else "v1"
    return "v2" if "" in mounts else ""


def own_cgroups(raw: str | None = None) -> dict[str, str]:
    """This process's cgroup path by controller, "" for v2."""
    if raw is None:
        raw = os.fsdecode(Path("/proc/self/cgroup").read_bytes())
    paths: dict[str, str] = {}
    for line in raw.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths
