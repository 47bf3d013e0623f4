"""Limits of a cgroup, proved by what they do to a process inside it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner.job import Limits
from jobrunner.linux.cgroup import CgroupHost, JobCgroup, detect
from jobrunner.linux.disk import disks_under
from tests.support.cgroups import JOB, own_tree, run, start
from tests.support.shim import wait_until
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root", "cgroup:memory")

SPIN = "import time, sys\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"
FORK = """
import os, time
children = []
try:
    while True:
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(60)
except BlockingIOError:
    print(len(children))
for pid in children:
    os.kill(pid, 9)
    os.wait()
"""


@pytest.fixture
def host() -> Iterator[CgroupHost]:
    with own_tree() as tree:
        yield tree


def on_disk(path: Path, size: int) -> Path:
    """A file of zeros, with nothing left to be written back."""
    with path.open("wb") as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())
    return path


async def finish(cgroup: JobCgroup) -> None:
    assert await cgroup.removed()


async def test_cpu_time_is_held_to_its_share(host: CgroupHost) -> None:
    cgroup = host.create(JOB, Limits(cpus=0.1))  # so little that a host under load has it too
    began = time.monotonic()
    spinners = [start(cgroup, [sys.executable, "-c", SPIN, "2"]) for _ in range(2)]
    for spinner in spinners:
        spinner.communicate(timeout=at_most(20))
    wall = time.monotonic() - began
    usage = cgroup.usage()
    assert usage.cpu_user is not None
    assert usage.cpu_system is not None
    assert usage.throttled is not None
    assert 0.06 * wall < usage.cpu_user + usage.cpu_system < 0.13 * wall
    assert usage.throttled > 0.2
    await finish(cgroup)


async def test_a_process_past_its_memory_is_killed_and_counted(host: CgroupHost) -> None:
    size = 32 << 20
    cgroup = host.create(JOB, Limits(memory=size))
    ended = run(cgroup, [sys.executable, "-c", f"bytearray({2 * size}); print('survived')"])
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"")
    usage = cgroup.usage()
    # On v2 the kernel counts the process that ran out of memory once more with its group (memory.oom.group).
    assert usage.oom_kills == (2 if host.version == "v2" else 1)
    assert usage.memory_peak is not None
    assert size - 4096 * 64 <= usage.memory_peak <= size
    await finish(cgroup)


async def test_a_process_within_its_memory_lives(host: CgroupHost) -> None:
    cgroup = host.create(JOB, Limits(memory=64 << 20))
    ended = run(cgroup, [sys.executable, "-c", f"bytearray({16 << 20}); print('survived')"])
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"survived\n", b"")
    assert cgroup.usage().oom_kills == 0
    await finish(cgroup)


async def test_forks_past_the_limit_fail(host: CgroupHost) -> None:
    cgroup = host.create(JOB, Limits(pids=8))
    ended = run(cgroup, [sys.executable, "-c", FORK])
    assert (ended.stdout, ended.stderr) == (b"7\n", b"")
    assert cgroup.usage().pids_peak in (8, None)
    await finish(cgroup)


@pytest.mark.requires("disk")
@pytest.mark.parametrize(
    ("limits", "block", "count"),
    [(Limits(write_bps=4_000_000), 500_000 // 4096 * 4096, 9), (Limits(write_iops=10), 4096, 11)],
    ids=["bytes", "operations"],
)
async def test_direct_writes_are_held_to_their_rate(
    host: CgroupHost, tmp_path: Path, limits: Limits, block: int, count: int
) -> None:
    file = on_disk(tmp_path / "file", block * count)  # so that nothing but the data is written
    cgroup = host.create(JOB, limits, disks_under([tmp_path]))
    command = ["dd", "if=/dev/zero", f"of={file}", f"bs={block}", f"count={count}", "oflag=direct", "conv=notrunc"]
    began = time.monotonic()
    ended = run(cgroup, command)
    assert ended.returncode == 0, ended.stderr
    assert 0.9 < time.monotonic() - began < at_most(10)
    usage = cgroup.usage()
    assert usage.write_bytes == block * count
    assert usage.write_ops is not None
    assert count <= usage.write_ops <= count + 4  # a write across two extents of the file is two operations
    buffered = ["buffered writes are not limited" in text for text in cgroup.missing]
    assert buffered == ([] if host.version == "v2" else [True])
    await finish(cgroup)


@pytest.mark.requires("disk")
@pytest.mark.parametrize(
    ("limits", "block", "count"),
    [(Limits(read_bps=4_000_000), 1 << 20, 4), (Limits(read_iops=10), 4096, 11)],
    ids=["bytes", "operations"],
)
async def test_direct_reads_are_held_to_their_rate(
    host: CgroupHost, tmp_path: Path, limits: Limits, block: int, count: int
) -> None:
    file = on_disk(tmp_path / "file", block * count)
    cgroup = host.create(JOB, limits, disks_under([tmp_path]))
    began = time.monotonic()
    ended = run(cgroup, ["dd", f"if={file}", "of=/dev/null", f"bs={block}", "iflag=direct"])
    assert ended.returncode == 0, ended.stderr
    assert 0.8 < time.monotonic() - began < at_most(10)
    usage = cgroup.usage()
    assert usage.read_bytes == block * count
    assert usage.read_ops is not None and usage.read_ops >= count
    assert cgroup.missing == ()
    await finish(cgroup)


@pytest.mark.requires("disk")
async def test_a_kill_ends_who_waits_for_the_disk(host: CgroupHost, tmp_path: Path) -> None:
    """What sweeps after a dead shim: such a process takes no signal before its limit is gone."""
    cgroup = host.create(JOB, Limits(write_bps=2), disks_under([tmp_path]))
    with start(cgroup, ["dd", "if=/dev/zero", f"of={tmp_path}/file", "bs=1M", "count=1", "oflag=direct"]) as process:
        stat = Path("/proc", str(process.pid), "stat")
        wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "D")
        cgroup.kill()
        assert process.wait(at_most(10)) == -signal.SIGKILL
    await finish(cgroup)


async def test_what_has_not_been_used_is_none_and_not_unknown(host: CgroupHost, tmp_path: Path) -> None:
    cgroup = host.create(JOB, Limits(), disks_under([tmp_path]))
    usage = cgroup.usage()
    assert (usage.read_bytes, usage.write_bytes, usage.read_ops, usage.write_ops, usage.oom_kills) == (0, 0, 0, 0, 0)
    await finish(cgroup)


@pytest.mark.requires("disk")
async def test_disk_use_is_counted_without_any_limit(host: CgroupHost, tmp_path: Path) -> None:
    cgroup = host.create(JOB, Limits(), disks_under([tmp_path]))
    ended = run(cgroup, ["dd", "if=/dev/zero", f"of={tmp_path}/file", "bs=64k", "count=4", "oflag=direct"])
    assert ended.returncode == 0, ended.stderr
    usage = cgroup.usage()
    assert (usage.write_bytes, usage.read_bytes) == (4 << 16, 0)
    await finish(cgroup)


def base_of(cgroup: JobCgroup, controller: str) -> Path:
    """The cgroup of all jobs together."""
    return Path(cgroup.paths.get(controller) or cgroup.paths["unified"]).parents[1]


async def test_a_tighter_limit_above_is_told(host: CgroupHost) -> None:
    """As that of a container or a service; it holds, whatever the job's own says."""
    wanted = Limits(cpus=0.5, memory=256 << 20, pids=100)
    bare = host.create(JOB, Limits())
    cpu, memory, pids = (base_of(bare, controller) for controller in ("cpu", "memory", "pids"))
    await finish(bare)
    if (cpu / "cpu.max").exists():
        (cpu / "cpu.max").write_text("20000 100000")
        (memory / "memory.max").write_text(str(64 << 20))
    else:
        (cpu / "cpu.cfs_quota_us").write_text("20000")
        (memory / "memory.limit_in_bytes").write_text(str(64 << 20))
    (pids / "pids.max").write_text("50")
    again = detect("", cpu.name)  # as a server that is started there
    cgroup = again.create(JOB, wanted)
    assert cgroup.missing == (
        "cpus: 0.5 were asked for, and all jobs together have 0.2, by a cgroup above them",
        f"memory: {256 << 20} were asked for, and all jobs together have {64 << 20}, by a cgroup above them",
        "pids: 100 were asked for, and all jobs together have 50, by a cgroup above them",
    )
    ended = run(cgroup, [sys.executable, "-c", f"bytearray({128 << 20}); print('survived')"])
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"")
    await finish(cgroup)
    less = again.create(JOB, Limits(cpus=0.2, memory=64 << 20, pids=50))
    assert less.missing == ()
    await finish(less)
