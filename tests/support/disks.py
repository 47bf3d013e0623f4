"""Block devices made of files, and file systems on them: loop devices, their partitions, logical volumes, btrfs on several."""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KINDS", "Place", "loop_device", "mounted", "number_of"]

MIB = 1 << 20
BLKPG, BLKPG_ADD_PARTITION = 0x1269, 1
WITHOUT_UDEV = {"DM_DISABLE_UDEV": "1"}


@dataclass(frozen=True)
class Place:
    """A directory on disks that are nobody else's."""

    path: Path
    disks: frozenset[str]
    """MAJOR:MINOR of each, and of what is made of them."""
    share: float = 1.0
    """Of what is read or written, that of the disk that has most."""


def command(*args: str | Path, env: Mapping[str, str] | None = None) -> str:
    return subprocess.run(args, check=True, capture_output=True, text=True, env={**os.environ, **(env or {})}).stdout.strip()


@contextmanager
def loop_device(image: Path, size: int, *options: str) -> Iterator[str]:
    """A block device over a file, gone afterwards."""
    with image.open("ab") as file:
        file.truncate(size)
    device = command("losetup", "--show", "--find", *options, image)
    try:
        yield device
    finally:
        command("losetup", "--detach", device)


@contextmanager
def mounted(at: Path, *options: str | Path) -> Iterator[Path]:
    at.mkdir()
    command("mount", *options, at)
    try:
        yield at
    finally:
        command("umount", "--lazy", at)


def number_of(device: str | Path) -> str:
    found = Path(device).stat().st_rdev
    return f"{os.major(found)}:{os.minor(found)}"


@contextmanager
def _partition(image: Path) -> Iterator[tuple[str, str]]:
    """A disk and its first partition, which no table tells of (linux/blkpg.h): kernels differ in the tables that they read."""
    with loop_device(image, 64 * MIB, "--partscan") as device:
        partition = ctypes.create_string_buffer(struct.pack("<qqi64s64s4x", MIB, 62 * MIB, 1, b"", b""))
        with Path(device).open("rb") as disk:
            fcntl.ioctl(
                disk, BLKPG, struct.pack("<iii4xQ", BLKPG_ADD_PARTITION, 0, len(partition) - 1, ctypes.addressof(partition))
            )
        major, minor = Path(f"/sys/class/block/{Path(device).name}p1/dev").read_text().split(":")
        node = image.with_suffix(".partition")
        os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(int(major), int(minor)))  # a host without udev makes none
        yield device, str(node)


@contextmanager
def _file_system(directory: Path, device: str, kind: str, *disks: str) -> Iterator[Place]:
    command(f"mkfs.{kind}", "-q", device)
    with mounted(directory / kind, "-t", kind, device) as where:
        yield Place(where, frozenset(map(number_of, disks or (device,))))


@contextmanager
def _ext4(directory: Path) -> Iterator[Place]:
    with loop_device(directory / "image", 64 * MIB) as device, _file_system(directory, device, "ext4") as place:
        yield place


@contextmanager
def _xfs(directory: Path) -> Iterator[Place]:
    with loop_device(directory / "image", 320 * MIB) as device, _file_system(directory, device, "xfs") as place:
        yield place


@contextmanager
def _on_partition(directory: Path) -> Iterator[Place]:
    with _partition(directory / "image") as (disk, part), _file_system(directory, part, "ext4", disk) as place:
        yield place


@contextmanager
def _mapped(directory: Path, table: str, *disks: str) -> Iterator[Place]:
    """A device of the kernel's device mapper."""
    name = f"jobrunner-test-{secrets.token_hex(4)}"
    command("dmsetup", "create", name, "--table", table, env=WITHOUT_UDEV)
    try:
        device = f"/dev/mapper/{name}"
        with _file_system(directory, device, "ext4", device, *disks) as place:
            yield place
    finally:
        command("dmsetup", "remove", "--deferred", name, env=WITHOUT_UDEV)


@contextmanager
def _logical_volume(directory: Path) -> Iterator[Place]:
    """Of a disk's partition and of another disk, as LVM's linear ones are: a third of it on the first."""
    with _partition(directory / "image") as (first, part), loop_device(directory / "second", 128 * MIB) as second:
        sectors = [int(command("blockdev", "--getsz", device)) for device in (part, second)]
        table = f"0 {sectors[0]} linear {part} 0\n{sectors[0]} {sectors[1]} linear {second} 0"
        with _mapped(directory, table, first, second) as place:
            yield place


@contextmanager
def _multipath(directory: Path) -> Iterator[Place]:
    """One path to one disk. It hands requests down, not operations that the disk's throttle could hold."""
    with loop_device(directory / "image", 64 * MIB) as disk:
        table = f"0 {command('blockdev', '--getsz', disk)} multipath 0 0 1 1 round-robin 0 1 1 {number_of(disk)} 1000"
        with _mapped(directory, table, disk) as place:
            yield place


@contextmanager
def _overlay(directory: Path) -> Iterator[Place]:
    """Its upper directory is on a disk of its own, and its lower one is not."""
    with _ext4(directory) as place:
        lower, upper, work = directory / "lower", place.path / "upper", place.path / "work"
        for part in (lower, upper, work):
            part.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        with mounted(directory / "overlay", "-t", "overlay", "-o", options, "overlay") as where:
            yield Place(where, place.disks)


@contextmanager
def _btrfs(directory: Path, count: int = 1) -> Iterator[Place]:
    with ExitStack() as stack:
        devices = [stack.enter_context(loop_device(directory / f"image{number}", 256 * MIB)) for number in range(count)]
        command("mkfs.btrfs", "-q", "-d", "raid0" if count > 1 else "single", *devices)
        for device in devices:  # udev does this where there is one
            command("btrfs", "device", "scan", device)
        where = stack.enter_context(mounted(directory / "btrfs", devices[0]))
        yield Place(where, frozenset(map(number_of, devices)), 1 / count)


@contextmanager
def _btrfs_on_two(directory: Path) -> Iterator[Place]:
    with _btrfs(directory, 2) as place:
        yield place


@contextmanager
def _subvolume(directory: Path) -> Iterator[Place]:
    """Mounted by itself, as systems on btrfs have their directories."""
    with _btrfs(directory) as place:
        command("btrfs", "subvolume", "create", place.path / "sub")
        device = command("findmnt", "--noheadings", "--output", "SOURCE", place.path)
        with mounted(directory / "subvolume", "-o", "subvol=sub", device) as where:
            yield Place(where, place.disks)


KINDS: Mapping[str, Callable[[Path], AbstractContextManager[Place]]] = {
    "disk": _ext4,
    "partition": _on_partition,
    "logical volume": _logical_volume,
    "multipath": _multipath,
    "overlay": _overlay,
    "xfs": _xfs,
    "btrfs": _btrfs,
    "subvolume": _subvolume,
    "btrfs on two disks": _btrfs_on_two,
}
"""Context managers, each of a directory that has nothing in it, giving a Place."""
