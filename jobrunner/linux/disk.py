"""The whole disks that paths are on: what a limit of disk I/O has to name.

The block layer throttles disks, not partitions and not file systems, so a path is followed down: mount, overlay's upper directory,
partition, logical volume or RAID, to the disks below.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jobrunner.linux.mountinfo import Mount, mount_of, read_mountinfo

__all__ = ["Disk", "disks_under", "mounted_on_disks"]

MEMORY = ("tmpfs", "ramfs")
SYS = Path("/sys")


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that something was found on, or why there is none."""

    device: str
    """`MAJOR:MINOR` of the whole disk; empty if there is none."""
    path: str
    """The path that was asked for."""
    reason: str = ""
    """Why there is no disk: `/x is on nfs, which has no disk here`."""
    memory: bool = False
    """Nothing written there reaches a disk, so there is nothing to limit."""


def mounted_on_disks() -> list[str]:
    """Mount points of this process's mount table whose file system is on a block device: what a job that sees them can write to."""
    return [mount.point for mount in read_mountinfo() if mount.source.startswith("/dev/")]


def disks_under(paths: Iterable[str | os.PathLike[str]], sys: Path = SYS) -> list[Disk]:
    """The disks under these paths, each once; for a path without one, a Disk that says why."""
    found: dict[str, Disk] = {}
    for path in _on_different(paths):
        for disk in _disks_of(os.fspath(path), os.fspath(path), sys):
            found.setdefault(disk.device or disk.reason, disk)
    return list(found.values())


def _on_different(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str | os.PathLike[str]]:
    """Of paths on one block device the first: the others have nothing new to tell."""
    seen: set[int] = set()
    for path in paths:
        with contextlib.suppress(OSError):
            number = Path(path).stat().st_dev
            if os.major(number) and number in seen:
                continue
            seen.add(number)
        yield path


def _disks_of(path: str, asked: str, sys: Path) -> list[Disk]:
    try:
        number = Path(path).stat().st_dev
    except OSError as exc:
        return [Disk("", asked, f"{asked}: {exc.strerror}")]
    if os.major(number):
        return _whole_disks(f"{os.major(number)}:{os.minor(number)}", asked, sys)
    mount = mount_of(os.path.realpath(path), read_mountinfo())
    return _disks_of_mount(mount, asked, sys) if mount else [Disk("", asked, f"{asked}: its mount is not known")]


def _disks_of_mount(mount: Mount, asked: str, sys: Path) -> list[Disk]:
    """A file system with an anonymous device number: major 0, which no disk has."""
    upper = mount.option("upperdir")
    if mount.fstype == "overlay" and upper and Path(upper).is_dir():
        # A symbolic loop of overlays cannot be: each one's upper directory is older than itself.
        return _disks_of(upper, asked, sys)
    if mount.source.startswith("/dev/"):
        try:
            status = Path(mount.source).stat()
        except OSError as exc:
            return [Disk("", asked, f"{asked} is on {mount.source}: {exc.strerror}")]
        if stat.S_ISBLK(status.st_mode):
            device = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
            members = _btrfs_members(device, sys) if mount.fstype == "btrfs" else [device]
            return [disk for member in members for disk in _whole_disks(member, asked, sys)]
    if mount.fstype in MEMORY:
        return [Disk("", asked, f"{asked} is on {mount.fstype}, which is memory", memory=True)]
    return [Disk("", asked, f"{asked} is on {mount.fstype}, which has no disk here")]


def _whole_disks(device: str, asked: str, sys: Path) -> list[Disk]:
    """From a block device down to the disks: a partition's parent, the members of a logical volume or a RAID."""
    directory = f"{sys}/dev/block/{device}"
    try:
        if Path(directory, "partition").exists():
            device = _number_of(f"{directory}/..")  # the kernel's way up, behind the symbolic link
            directory = f"{sys}/dev/block/{device}"
        members = sorted(os.listdir(f"{directory}/slaves"))
        if members:
            numbers = [_number_of(f"{directory}/slaves/{member}") for member in members]
            return [disk for number in numbers for disk in _whole_disks(number, asked, sys)]
    except OSError as exc:
        return [Disk("", asked, f"{asked} is on device {device}: {exc.filename}: {exc.strerror}")]
    return [Disk(device, asked)]


def _number_of(directory: str) -> str:
    """MAJOR:MINOR of a device's directory in sysfs."""
    return Path(directory, "dev").read_text().strip()


def _btrfs_members(device: str, sys: Path) -> list[str]:
    """All devices of the btrfs that this device belongs to."""
    for devices in (sys / "fs/btrfs").glob("*/devices"):
        members = [(member / "dev").read_text().strip() for member in devices.iterdir()]
        if device in members:
            return sorted(members)
    return [device]
