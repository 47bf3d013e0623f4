"""What is read from /proc, /sys and cgroup files, on samples of hosts that this one is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobrunner.job import Usage
from jobrunner.linux.counters import Counter, usage_of
from jobrunner.linux.disk import Disk, disks_seen, disks_under, passes_on
from jobrunner.linux.mountinfo import cgroup_mounts, mount_of, own_cgroups, parse_mountinfo

DOCKER_V1 = rb"""
30 23 0:26 / / rw,relatime - overlay overlay rw,lowerdir=/l,upperdir=/var/lib/docker/up,workdir=/w
31 30 0:27 /docker/ab /sys/fs/cgroup/cpu,cpuacct ro,nosuid shared:9 master:2 - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 /docker/ab /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory
33 30 8:1 /vol /mnt/with\040space rw - ext4 /dev/sda1 rw
nonsense
"""


def test_mounts_of_a_container_are_parsed() -> None:
    mounts = parse_mountinfo(DOCKER_V1)
    assert [mount.point for mount in mounts] == ["/", "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/memory", "/mnt/with space"]
    assert mounts[0].option("upperdir") == "/var/lib/docker/up"
    assert mount_of("/mnt/with space/x", mounts) == mounts[3]
    assert mount_of("/mnt/with spaces", mounts) == mounts[0]


@pytest.mark.parametrize(
    ("own", "directory"),
    [
        ("/docker/ab", "/sys/fs/cgroup/cpu,cpuacct"),
        ("/docker/ab/inner", "/sys/fs/cgroup/cpu,cpuacct/inner"),
        ("/", "/sys/fs/cgroup/cpu,cpuacct"),
        ("/docker/abc", "/sys/fs/cgroup/cpu,cpuacct"),
    ],
)
def test_the_own_cgroup_is_found_below_what_is_mounted(own: str, directory: str) -> None:
    found = cgroup_mounts(parse_mountinfo(DOCKER_V1))
    assert found["cpu"] == found["cpuacct"]
    assert found["cpu"].directory(own) == directory


def test_own_cgroups_of_a_hybrid_host_are_parsed() -> None:
    assert own_cgroups("4:cpu,cpuacct:/a:b\n1:name=systemd:/s\n0::/u\n") == {
        "cpu": "/a:b",
        "cpuacct": "/a:b",
        "name=systemd": "/s",
        "": "/u",
    }


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("-", "12\n", 24),
        ("oom_kill", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 6),
        ("Read", "8:0 Read 5\n8:0 Write 7\n8:16 Read 1\n", 12),
        ("rbytes", "8:0 rbytes=5 wbytes=7\n8:16 rbytes=1 wbytes=0\n", 12),
        ("Read", "Total 0\n", None),
        ("-", "max\n", None),
        ("-", "", None),
        ("oom_kill", "oom_kill", None),
    ],
)
def test_a_counter_is_the_sum_of_what_follows_its_key(key: str, text: str, value: int | None) -> None:
    assert Counter("read_bytes", 2, key, "/x").value(text) == value


def test_a_counter_that_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("user_usec 1500000\n")
    found = usage_of(
        [
            Counter("cpu_user_ns", 1000, "user_usec", f"{tmp_path}/cpu.stat"),
            Counter("cpu_system_ns", 1000, "system_usec", f"{tmp_path}/cpu.stat"),
            Counter("pids_peak", 1, "-", f"{tmp_path}/pids.peak"),
        ]
    )
    assert found == Usage(cpu_user=1.5)


def device(sys: Path, number: str, where: str, *, partition: bool = False, members: tuple[str, ...] = ()) -> None:
    directory = sys / "devices" / where
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "dev").write_text(f"{number}\n")
    (sys / "dev/block").mkdir(parents=True, exist_ok=True)
    (sys / "dev/block" / number).symlink_to(directory)
    if partition:
        (directory / "partition").write_text("1\n")
    (directory / "slaves").mkdir()
    for member in members:
        (directory / "slaves" / member.rsplit("/", 1)[-1]).symlink_to(sys / "devices" / member)


def number_of(path: Path) -> str:
    found = path.stat().st_dev
    return f"{found >> 8 & 0xFFF}:{found & 0xFF}"


@pytest.mark.requires("disk")
def test_a_partition_is_limited_at_its_disk(tmp_path: Path) -> None:
    device(tmp_path, "77:0", "sdx")
    device(tmp_path, number_of(tmp_path), "sdx/sdx1", partition=True)
    assert disks_under([tmp_path, tmp_path / "devices"], tmp_path) == [Disk("77:0", str(tmp_path))]


@pytest.mark.requires("disk")
def test_a_logical_volume_is_limited_and_every_disk_below_it_too(tmp_path: Path) -> None:
    device(tmp_path, "77:0", "sdx")
    device(tmp_path, "77:1", "sdx/sdx1", partition=True)
    device(tmp_path, "77:16", "sdy")
    device(tmp_path, number_of(tmp_path), "dm-0", members=("sdx/sdx1", "sdy"))
    assert [disk.device for disk in disks_under([tmp_path], tmp_path)] == [number_of(tmp_path), "77:0", "77:16"]


def test_a_path_without_a_disk_says_why(tmp_path: Path) -> None:
    memory, proc, absent = disks_under(["/dev/shm", "/proc", tmp_path / "absent"])
    assert (memory.device, memory.memory, memory.reason) == ("", True, "/dev/shm is on tmpfs, which is memory")
    assert (proc.device, proc.memory, proc.reason) == ("", False, "/proc is on proc, which has no disk here")
    assert absent.reason == f"{tmp_path / 'absent'}: No such file or directory"


def test_no_file_server_is_asked_for_what_is_under_a_path() -> None:
    (proc,) = (disk for disk in disks_seen([], ["/proc/not/there"]) if not disk.device)
    assert (proc.path, proc.reason) == ("/proc/not/there", "/proc/not/there is on proc, which has no disk here")


@pytest.mark.parametrize(("made", "passed"), [("dm-0", True), ("mq", False), ("md/raid1", True), ("md/raid6", False), ("", False)])
def test_what_a_device_is_made_of_is_asked_in_its_place(tmp_path: Path, made: str, passed: bool) -> None:
    device(tmp_path, "77:0", "sdx")
    device(tmp_path, "77:9", "upper", members=("sdx",) if made else ())
    if made == "mq":
        (tmp_path / "devices/upper/mq").mkdir()
    elif made.startswith("md/"):
        (tmp_path / "devices/upper/md").mkdir()
        (tmp_path / "devices/upper/md/level").write_text(f"{made[3:]}\n")
    assert passes_on("77:9", tmp_path) == passed
