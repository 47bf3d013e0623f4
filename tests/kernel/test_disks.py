"""Real file systems on real block devices: which whole disk is under a path, and that a limit holds there."""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from jobrunner import Limits
from jobrunner.errors import HostError
from jobrunner.linux.disk import Disk, disks_under
from tests.support.cgroups import JOB, own_tree
from tests.support.cgroups import run as run_in

pytestmark = [pytest.mark.requires("root"), pytest.mark.generation("v1")]  # the virtual machine has no btrfs

MIB = 1 << 20
BLKPG, BLKPG_ADD_PARTITION = 0x1269, 1


@contextmanager
def loop_device(image: Path, size: int, *options: str) -> Iterator[str]:
    """A block device over a file, gone afterwards."""
    with image.open("ab") as file:
        file.truncate(size)
    done = subprocess.run(["losetup", "--show", "--find", *options, str(image)], check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def mounted(at: Path, *options: str) -> Iterator[Path]:
    at.mkdir()
    subprocess.run(["mount", *options, str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def number_of(device: str) -> str:
    found = Path(device).stat().st_rdev
    return f"{os.major(found)}:{os.minor(found)}"


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A file system and the number of its disk."""
    with loop_device(tmp_path / "image", 64 * MIB) as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        with mounted(tmp_path / "ext4", device) as where:
            yield where, number_of(device)


@pytest.fixture
def overlay(tmp_path: Path, ext4: tuple[Path, str]) -> Iterator[Path]:
    """An overlay whose upper directory is on `ext4`, and whose lower one is not."""
    (tmp_path / "lower").mkdir()
    upper, work = ext4[0] / "upper", ext4[0] / "work"
    upper.mkdir()
    work.mkdir()
    options = f"lowerdir={tmp_path / 'lower'},upperdir={upper},workdir={work}"
    with mounted(tmp_path / "overlay", "-t", "overlay", "-o", options, "overlay") as where:
        yield where


def test_an_overlay_is_on_the_disk_of_its_upper_directory(ext4: tuple[Path, str], overlay: Path) -> None:
    assert disks_under([overlay]) == [Disk(ext4[1], str(overlay))]


def test_a_write_limit_holds_on_an_overlay(ext4: tuple[Path, str], overlay: Path) -> None:
    write = f"dd if=/dev/zero of={overlay}/file bs=1M count=10 oflag=direct 2>/dev/null && cut -d' ' -f1 /proc/uptime"
    with own_tree() as host:
        cgroup = host.create(JOB, Limits(write_bps=5 * MIB), disks_under([overlay]))
        try:
            done = run_in(cgroup, ["sh", "-c", f"cut -d' ' -f1 /proc/uptime && {write}"])
            usage = cgroup.usage()
        finally:
            cgroup.remove()
    begun, ended = map(float, done.stdout.split())
    assert ended - begun > 1.6  # without it, some milliseconds
    assert usage.write_bytes is not None
    assert usage.write_bytes >= 10 * MIB


@pytest.mark.requires("command:mkfs.btrfs")
def test_btrfs_is_on_all_of_its_disks(tmp_path: Path) -> None:
    with ExitStack() as stack:
        devices = [stack.enter_context(loop_device(tmp_path / f"image{number}", 128 * MIB)) for number in range(2)]
        subprocess.run(["mkfs.btrfs", "-q", "-d", "raid0", *devices], check=True)
        for device in devices:  # udev does this where there is one
            subprocess.run(["btrfs", "device", "scan", device], check=True, capture_output=True)
        where = stack.enter_context(mounted(tmp_path / "btrfs", devices[0]))
        subprocess.run(["btrfs", "subvolume", "create", str(where / "sub")], check=True, capture_output=True)
        found = disks_under([where, where / "sub"])
    assert sorted(disk.device for disk in found) == sorted(map(number_of, devices))


def add_partition(device: str, begin: int, size: int) -> None:
    """Make a part of a disk its first partition, without a table (linux/blkpg.h): kernels differ in the tables that they read."""
    partition = ctypes.create_string_buffer(struct.pack("<qqi64s64s4x", begin, size, 1, b"", b""))
    with Path(device).open("rb") as disk:
        fcntl.ioctl(disk, BLKPG, struct.pack("<iii4xQ", BLKPG_ADD_PARTITION, 0, len(partition) - 1, ctypes.addressof(partition)))


def test_a_partition_is_on_its_disk(tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", 64 * MIB, "--partscan") as device:
        add_partition(device, MIB, 32 * MIB)
        major, minor = Path(f"/sys/class/block/{Path(device).name}p1/dev").read_text().split(":")
        part = tmp_path / "node"
        os.mknod(part, stat.S_IFBLK | 0o600, os.makedev(int(major), int(minor)))  # a host without udev makes none
        subprocess.run(["mkfs.ext4", "-q", part], check=True)
        with mounted(tmp_path / "part", str(part)) as where:
            assert number_of(str(part)) != number_of(device)
            assert disks_under([where]) == [Disk(number_of(device), str(where))]


def test_a_limit_where_there_is_only_memory_is_refused_with_the_reason(tmp_path: Path) -> None:
    with mounted(tmp_path / "memory", "-t", "tmpfs", "tmpfs") as where, own_tree() as host:
        disks = disks_under([where])
        with pytest.raises(HostError, match=f"cannot apply limit write_bps: {where} is on tmpfs, which is memory"):
            host.create(JOB, Limits(write_bps=MIB), disks, explicit=["write_bps"])
