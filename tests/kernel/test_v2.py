"""What is true of a host with cgroup v2 alone: the tree as it is made, and limits that only v2 holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from jobrunner import JobSpec, Limits
from jobrunner.errors import HostError, StopFailed
from jobrunner.linux.cgroup import CgroupHost
from jobrunner.linux.disk import disks_under
from jobrunner.linux.mountinfo import own_cgroups
from tests.support.cgroups import JOB, lower_cpus, member_directories, own_tree, start
from tests.support.runner import open_runner, output, run, run_output, shell
from tests.support.timing import at_most, fail_after

pytestmark = [pytest.mark.generation("v2"), pytest.mark.requires("root", "cgroup:memory")]

MIB = 1 << 20
TREE = Path("/sys/fs/cgroup")


@pytest.fixture
def host() -> Iterator[CgroupHost]:
    with own_tree() as tree:
        yield tree


def text(path: Path) -> str:
    return path.read_text().strip()


async def test_the_limits_are_in_the_kernel_as_asked(host: CgroupHost, tmp_path: Path) -> None:
    limits = Limits(cpus=1.5, memory=64 * MIB + 100, pids=77, read_bps=5_000_000, write_bps=6_000_000, read_iops=70, write_iops=80)
    (disk,) = disks_under([tmp_path])
    cgroup = host.create(JOB, limits, [disk])
    top = Path(cgroup.paths["unified"])
    assert text(top / "cpu.max") == "150000 100000"
    names = ("memory.max", "memory.swap.max", "memory.oom.group", "pids.max", "io.max")
    assert [text(top / "job" / name) for name in names] == [
        str(64 * MIB),
        "0",
        "1",
        "77",
        f"{disk.device} rbps=5000000 wbps=6000000 riops=70 wiops=80",
    ]
    assert [text(top / "shim" / name) for name in ("memory.max", "pids.max")] == ["max", "max"]
    assert cgroup.missing == ()
    assert cgroup.remove()


async def test_a_job_is_born_into_its_cgroup_and_its_shim_beside_it(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("sleep", ("1000",)))
        assert job.cgroup is not None
        (members,) = member_directories(job.cgroup)
        inside = {text(Path("/proc", pid, "comm")) for pid in text(members / "cgroup.procs").split()}
        beside = {text(Path("/proc", pid, "comm")) for pid in text(members.parent / "shim" / "cgroup.procs").split()}
        assert (inside, beside) == ({"jobrunner-init", "sleep"}, {"jobrunner-shim"})
        assert text(members.parent / "cgroup.procs") == ""


async def test_a_job_sees_its_own_cgroup_as_the_root(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        _, data = await run_output(runner, shell("cat /proc/self/cgroup; grep ' - cgroup2 ' /proc/self/mountinfo | cut -d' ' -f4"))
    own, *roots = data.decode().split()
    assert own == "0::/"
    assert roots == ["/"]


async def test_a_job_reads_its_limits_where_a_jvm_does(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        script = "cd /sys/fs/cgroup; cat cpu.max memory.max pids.max"
        _, data = await run_output(runner, shell(script, limits=Limits(cpus=0.5, memory=256 * MIB, pids=100)))
    assert data.decode().split() == ["50000", "100000", str(256 * MIB), "100"]


async def test_the_kernel_takes_the_whole_job_when_its_memory_runs_out(tmp_path: Path) -> None:
    script = "sleep 1000 & (sleep 1000 &) ; python3 -c \"b'x' * (96 << 20)\"; echo went on"
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell(script, limits=Limits(memory=48 * MIB)))
        data = await output(job)
        info = await job.wait()
    assert (info.end_reason, data) == ("oom_killed", b"")
    assert info.usage.oom_kills is not None
    assert info.usage.oom_kills >= 4  # init, the shell and two sleepers went with the one that asked for too much


@pytest.mark.timeout(300)
async def test_a_job_that_is_out_of_memory_does_not_die_under_its_cpu_limit(tmp_path: Path) -> None:
    sleepers = "mkfifo go; n=0; while [ $n -lt 150 ]; do sleep 1000 & n=$((n+1)); done; echo up; read _ <go"
    script = f"{sleepers}; exec python3 -c \"b'x' * (96 << 20)\""
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell(script, limits=Limits(memory=80 * MIB, pids=300, cpus=2)))
        async with job.log() as reader:
            await anext(reader)
        assert job.cgroup is not None
        top = Path(job.cgroup.paths["unified"])
        lower_cpus(job.cgroup, 0.05)
        go = Path("/proc", text(top / "job" / "cgroup.procs").split()[-1], "root/work/go")
        await anyio.to_thread.run_sync(go.write_text, "\n")
        with fail_after(60):
            while not (kills := job.info().usage.oom_kills):  # noqa: ASYNC110  # the kernel's state
                await anyio.sleep(0.01)
        begun = time.monotonic()
        info = await job.wait()
    print(f"{kills} killed at first, gone after {time.monotonic() - begun:.2f} s")
    assert info.end_reason == "oom_killed"
    assert time.monotonic() - begun < at_most(3)  # under the limit some ten times as long


async def test_buffered_writes_are_held_to_their_rate(tmp_path: Path) -> None:
    script = "dd if=/dev/zero of=file bs=1M count=20 conv=fsync 2>/dev/null"
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell(script, limits=Limits(write_bps=10 * MIB)), seconds=30)
    assert info.status == "completed"
    assert info.usage.wall is not None
    assert 1.6 < info.usage.wall < at_most(3)
    assert info.usage.write_bytes is not None
    assert info.usage.write_bytes >= 20 * MIB


async def test_peaks_are_told_at_the_end(tmp_path: Path) -> None:
    script = "for i in 1 2 3 4 5; do sleep 0.5 & done; python3 -c \"b'x' * (40 << 20)\"; wait"
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell(script, limits=Limits(memory=128 * MIB)))
    assert info.usage.memory_peak is not None
    assert 40 * MIB < info.usage.memory_peak < 100 * MIB
    if (TREE / "system.slice/pids.peak").exists():  # Linux 6.1 has no pids.peak
        assert info.usage.pids_peak is not None
        assert info.usage.pids_peak >= 7


async def test_kill_takes_every_process_and_the_kernel_says_when(host: CgroupHost) -> None:
    cgroup = host.create(JOB, Limits(pids=64, cpus=0.5))
    (members,) = member_directories(cgroup)
    bomb = start(cgroup, ["/bin/sh", "-c", "b() { b & b & }; trap '' TERM; setsid sleep 600 & echo up; b; sleep 600"])
    assert bomb.stdout is not None
    assert bomb.stdout.readline() == b"up\n"
    assert "populated 1" in text(members / "cgroup.events")
    cgroup.kill()
    await anyio.to_thread.run_sync(bomb.communicate)
    with fail_after(5):
        while "populated 1" in text(members / "cgroup.events"):  # noqa: ASYNC110  # the kernel's state
            await anyio.sleep(0.01)
    assert await cgroup.removed()


async def test_a_job_found_at_start_up_has_the_same_cgroup(host: CgroupHost) -> None:
    made = host.create(JOB, Limits(pids=9))
    found = host.reopen(JOB, json.loads(json.dumps(dict(made.paths))))
    assert found.launch_items() == made.launch_items()
    assert host.reopen(JOB, {}).paths == made.paths
    assert host.leftovers() == [JOB]
    assert found.remove()
    assert host.leftovers() == []


async def test_a_second_one_of_the_same_id_is_refused_and_the_first_stays(host: CgroupHost) -> None:
    cgroup = host.create(JOB, Limits(pids=9))
    with pytest.raises(HostError, match="File exists"):
        host.create(JOB, Limits(pids=10))
    assert text(Path(cgroup.paths["unified"]) / "job" / "pids.max") == "9"
    assert cgroup.remove()


MAKES_ROOM = """
import json
from jobrunner.linux.cgroup import detect
from jobrunner.linux.mountinfo import own_cgroups
started = own_cgroups()[""]
trees = [repr(detect("", name)) for name in ("jobrunner-first", "jobrunner-second")]
print(json.dumps([started, own_cgroups()[""], trees]))
"""


@pytest.fixture
def delegated() -> Iterator[Path]:
    """A cgroup as a service manager gives it: the controllers are there, and nobody is in it."""
    parent = TREE / own_cgroups()[""].lstrip("/")
    above = parent.parent.parent if parent.name == "server" else parent  # where this process's own controllers come from
    directory = above / "jobrunner-test-delegated"
    directory.mkdir()
    try:
        yield directory
    finally:
        for path, _, _ in os.walk(directory, topdown=False):
            Path(path).rmdir()


def enter(directory: Path, *command: str) -> subprocess.Popen[str]:
    script = 'echo 0 > "$0"/cgroup.procs && exec "$@"'
    return subprocess.Popen(
        ["/bin/sh", "-c", script, str(directory), *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_server_that_is_alone_in_its_cgroup_makes_room_for_its_jobs(delegated: Path) -> None:
    out, err = enter(delegated, sys.executable, "-c", MAKES_ROOM).communicate(timeout=at_most(20))
    assert err == ""
    started, moved, trees = json.loads(out)
    assert moved == f"{started}/jobrunner-first/server"
    assert [tree.split()[1] for tree in trees] == [f"{TREE}{started}/jobrunner-{name}/jobs" for name in ("first", "second")]
    for directory in (delegated, delegated / "jobrunner-first", delegated / "jobrunner-first" / "jobs"):
        assert {"cpu", "memory", "pids", "io"} <= set(text(directory / "cgroup.subtree_control").split())


def test_a_cgroup_that_others_are_in_is_refused_with_the_remedy(delegated: Path) -> None:
    other = enter(delegated, "/bin/sh", "-c", "echo up; exec sleep 600")
    assert other.stdout is not None
    assert other.stdout.readline() == "up\n"
    try:
        _, err = enter(delegated, sys.executable, "-c", MAKES_ROOM).communicate(timeout=at_most(20))
    finally:
        other.kill()
        other.communicate()
    assert "other processes are in it; start the server in a cgroup of its own: systemd-run --scope -p Delegate=yes" in err


SPINNERS = "import os\nprint(flush=True)\nwhile True:\n  try: os.fork()\n  except OSError: pass"  # each of them goes on to spin


@pytest.mark.timeout(600)
async def test_a_stop_gets_through_to_the_shim_beside_hundreds_of_spinning_processes(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec(sys.executable, ("-c", SPINNERS), limits=Limits(cpus=2, pids=300)))
        assert job.cgroup is not None
        top = Path(job.cgroup.paths["unified"])
        with fail_after(20):
            while int(text(top / "job" / "pids.current")) < 290:  # noqa: ASYNC110  # the kernel's state
                await anyio.sleep(0.1)
        lower_cpus(job.cgroup, 0.05)
        with fail_after(6):
            with suppress(StopFailed):  # they may take longer to die here than a stop waits
                await job.stop(grace=0)
            info = await job.wait()
    assert (info.end_reason, info.signal) == ("stopped", 9)
