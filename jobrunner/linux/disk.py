"""The whole disks that paths are on: what a limit of disk I/O has to name.

The block layer throttles disks, not partitions and not file systems, so a path is followed down: mount, overlay's upper directory,
partition, logical volume or RAID, to the disks below. What is made of others is named beside them, because some of it does not tell
them who asks (parity RAID, integrity), or asks them behind the throttle (multipath).
"""

from __future__ import annotations

import fcntl
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from jobrunner.linux.mountinfo import Mount, mount_of, read_mountinfo

__all__ = ["Disk", "disks_seen", "disks_under", "passes_on"]

MEMORY = ("tmpfs", "ramfs")
SYS = Path("/sys")
PARITY = ("raid4", "raid5", "raid6")
"""Of md: a thread of the kernel's own writes to the members."""
BTRFS_INFO, BTRFS_INFO_SIZE, BTRFS_ID = 0x8400941F, 1024, slice(16, 32)
"""BTRFS_IOC_FS_INFO (linux/btrfs.h), and where its answer has the file system's id."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that something was found on, or why there is none."""

    device: str
    """`MAJOR:MINOR` of a whole disk, or of what is made of some; empty if there is none."""
    path: str
    """The path that was asked for."""
    reason: str = ""
    """Why there is no disk: `/x is on nfs, which has no disk here`."""
    memory: bool = False
    """Nothing written there reaches a disk, so there is nothing to limit."""


def disks_under(paths: Iterable[str | os.PathLike[str]], sys: Path = SYS) -> list[Disk]:
    """The disks under these paths, each once; for a path without one, a Disk that says why."""
    return _each_once(_on_different(paths, set(), sys))


def disks_seen(own: Iterable[str | os.PathLike[str]], named: Iterable[str], sys: Path = SYS) -> list[Disk]:
    """The disks under these paths, and of all that is mounted from block devices, as a job that sees it can use it.

    `named` is looked for in the mount table alone: it may be on a file server, and that may be away.
    """
    mounts, seen = read_mountinfo(), set[str]()
    found = list(_on_different(own, seen, sys))
    wanted = [(mount, mount.point) for mount in mounts if mount.source.startswith("/dev/")]
    wanted += [(mount, path) for path in map(os.path.normpath, named) if (mount := mount_of(path, mounts))]
    for mount, asked in wanted:
        if mount.device not in seen:
            seen.add(mount.device)
            found += _disks_of_mount(mount, mount.point, asked, sys)
    return _each_once(found)


def _each_once(disks: Iterable[Disk]) -> list[Disk]:
    """The first of those that are the same disk, or say the same."""
    found: dict[str, Disk] = {}
    for disk in disks:
        found.setdefault(disk.device or disk.reason, disk)
    return list(found.values())


def _on_different(paths: Iterable[str | os.PathLike[str]], seen: set[str], sys: Path) -> Iterator[Disk]:
    """Of paths on one block device the first one's: the others have nothing new to tell."""
    for path in [os.fspath(one) for one in paths]:
        try:
            number = Path(path).stat().st_dev
        except OSError as exc:
            yield Disk("", path, f"{path}: {exc.strerror}")
            continue
        device = f"{os.major(number)}:{os.minor(number)}"
        if not os.major(number):
            mount = mount_of(os.path.realpath(path), read_mountinfo())
            yield from _disks_of_mount(mount, path, path, sys) if mount else [Disk("", path, f"{path}: its mount is not known")]
        elif device not in seen:
            seen.add(device)
            yield from _whole_disks(device, path, sys)


def _disks_of_mount(mount: Mount, path: str, asked: str, sys: Path) -> list[Disk]:
    """By the mount that `path` is on. Major 0 is that of a file system with an anonymous number, which no disk has."""
    if not mount.device.startswith("0:"):
        return _whole_disks(mount.device, asked, sys)
    upper = mount.option("upperdir")
    if mount.fstype == "overlay" and upper and Path(upper).is_dir():
        # A symbolic loop of overlays cannot be: each one's upper directory is older than itself.
        return [replace(disk, path=asked) for disk in disks_under([upper], sys)]
    if mount.fstype == "btrfs" and (members := _btrfs_members(path, sys)):
        return [disk for member in members for disk in _whole_disks(member, asked, sys)]
    if mount.source.startswith("/dev/"):
        try:
            status = Path(mount.source).stat()
        except OSError as exc:
            return [Disk("", asked, f"{asked} is on {mount.source}: {exc.strerror}")]
        if stat.S_ISBLK(status.st_mode):
            return _whole_disks(f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}", asked, sys)
    if mount.fstype in MEMORY:
        return [Disk("", asked, f"{asked} is on {mount.fstype}, which is memory", memory=True)]
    return [Disk("", asked, f"{asked} is on {mount.fstype}, which has no disk here")]


def _whole_disks(device: str, asked: str, sys: Path) -> list[Disk]:
    """A block device, or the disk that it is a partition of, and what it is made of, down to the disks."""
    directory = f"{sys}/dev/block/{device}"
    try:
        if Path(directory, "partition").exists():
            device = _number_of(f"{directory}/..")  # the kernel's way up, behind the symbolic link
            directory = f"{sys}/dev/block/{device}"
        numbers = [_number_of(f"{directory}/slaves/{member}") for member in sorted(os.listdir(f"{directory}/slaves"))]
        return [Disk(device, asked), *(disk for number in numbers for disk in _whole_disks(number, asked, sys))]
    except OSError as exc:
        return [Disk("", asked, f"{asked} is on device {device}: {exc.filename}: {exc.strerror}")]


def passes_on(device: str, sys: Path = SYS) -> bool:
    """Whether what is asked of a device (MAJOR:MINOR) is asked of what it is made of, in the name of who asked; as counters.c."""
    directory = Path(sys, "dev/block", device)
    try:
        if not os.listdir(directory / "slaves") or (directory / "mq").exists():
            return False
    except OSError:
        return False
    level = directory / "md/level"
    return not level.exists() or level.read_text().strip() not in PARITY


def _number_of(directory: str) -> str:
    """MAJOR:MINOR of a device's directory in sysfs."""
    return Path(directory, "dev").read_text().strip()


def _btrfs_members(path: str, sys: Path) -> list[str]:
    """All devices of the btrfs that a path is on, by its id: the mount table names one, which a container may not have."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = fcntl.ioctl(fd, BTRFS_INFO, bytes(BTRFS_INFO_SIZE))
        finally:
            os.close(fd)
        devices = f"{sys}/fs/btrfs/{uuid.UUID(bytes=info[BTRFS_ID])}/devices"
        return sorted(_number_of(f"{devices}/{member}") for member in os.listdir(devices))
    except OSError:
        return []
