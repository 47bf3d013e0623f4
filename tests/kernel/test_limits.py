"""Limits by effect: each of them is met by a real job that goes past it."""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from jobrunner import JobSpec, Limits
from jobrunner.errors import StopFailed
from jobrunner.runner import RunnerJob
from tests.support.cgroups import limits_in_kernel, lower_cpus, member_directories
from tests.support.disks import KINDS
from tests.support.runner import open_runner, run, run_output, shell
from tests.support.timing import at_most, fail_after

MIB = 1 << 20


def python(code: str, **fields: object) -> JobSpec:
    return JobSpec("python3", ("-c", code), **fields)  # type: ignore[arg-type]


async def test_a_64_mib_limit_kills_a_128_mib_job_and_says_why(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, python("x = b'x' * (128 << 20); print(len(x))", limits=Limits(memory=64 * MIB)))
    assert (info.status, info.end_reason) == ("failed", "oom_killed")
    assert info.message.startswith(f"out of memory: the limit is {64 * MIB} bytes")
    assert info.usage.memory_peak is not None
    assert 48 * MIB < info.usage.memory_peak <= 64 * MIB
    assert info.usage.oom_kills


async def test_a_job_below_its_memory_limit_is_not_killed(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, python("x = b'x' * (32 << 20)", limits=Limits(memory=64 * MIB)))
    assert info.status == "completed"


async def test_an_oom_kill_of_a_child_ends_the_whole_job(tmp_path: Path) -> None:
    bomb = "python3 -c \"x = b'x' * (128 << 20)\"; sleep 0.5; echo went on"
    async with open_runner(tmp_path) as runner:
        info, data = await run_output(runner, shell(bomb, limits=Limits(memory=64 * MIB)))
    assert info.end_reason == "oom_killed"
    assert b"went on" not in data


async def test_a_pids_limit_stops_a_fork_bomb(tmp_path: Path) -> None:
    bomb = python(
        "import os, time\n"
        "n = 0\n"
        "try:\n"
        "    while True:\n"
        "        if os.fork() == 0: time.sleep(100)\n"
        "        n += 1\n"
        "except BlockingIOError: print(n, flush=True)",
        limits=Limits(pids=20),
    )
    async with open_runner(tmp_path) as runner:
        info, data = await run_output(runner, bomb)
    assert info.status == "completed"
    assert int(data) == 18  # of 20 tasks pid 1 of the job is one and the command itself another


async def test_two_spinning_processes_under_half_a_cpu_use_half_a_cpu(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell("while :; do :; done & while :; do :; done", limits=Limits(cpus=0.5)))
        first, before = _cpu(job.info()), time.monotonic()
        await anyio.sleep(10)
        used, wall = _cpu(job.info()) - first, time.monotonic() - before
        held_back = throttled_periods(job)
        info = await job.stop(grace=0)
    assert info.usage.throttled is not None
    assert used / wall < 0.55
    # A host that is busy itself gives a job less than its limit. But who is held back in a period has had its whole share of it.
    assert used > 0.85 * 0.5 * PERIOD * held_back
    assert info.usage.throttled > 0.1 or used / wall < 0.45


PERIOD = 0.1
"""Of a CPU quota, in seconds."""


def throttled_periods(job: RunnerJob) -> int:
    """In how many the job has used its quota up: cpu.stat of sched-bwc(7)."""
    assert job.cgroup is not None
    top = Path(job.cgroup.paths.get("cpu") or job.cgroup.paths["unified"])
    return int(dict(line.split() for line in (top / "cpu.stat").read_text().splitlines())["nr_throttled"])


def _cpu(info: object) -> float:
    usage = info.usage  # type: ignore[attr-defined]
    return float(usage.cpu_user + usage.cpu_system)


@pytest.mark.generation("v1")  # test_v2.py has it for the emulator, where so small a share of it would not fork so many
async def test_many_processes_under_a_small_cpu_limit_die_at_once_all_the_same(tmp_path: Path) -> None:
    forks = python(
        "import os, signal\nsignal.signal(15, signal.SIG_IGN)\nprint(flush=True)\n"
        "while True:\n  try: os.fork()\n  except OSError: pass",
        limits=Limits(cpus=0.05, pids=300),
    )
    async with open_runner(tmp_path) as runner:
        job = await runner.start(forks)
        async with job.log() as reader:
            await anext(reader)
        await anyio.sleep(3)
        with anyio.fail_after(at_most(4)):
            info = await job.stop(grace=0.1)
    assert (info.end_reason, info.signal) == ("stopped", 9)


DYING_CPUS = 0.02


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["a kill", "its own end", "its stop signal"])
async def test_what_a_job_leaves_does_not_die_under_the_cpu_limit(tmp_path: Path, how: str) -> None:
    script = "mkfifo go; n=0; while [ $n -lt 250 ]; do sleep 1000 & n=$((n+1)); done; echo up; read _ <go; exit 7"
    async with open_runner(tmp_path) as runner, anyio.create_task_group() as stopping:
        job = await runner.start(shell(script, limits=Limits(cpus=2, pids=300, memory=256 * MIB)))
        async with job.log() as reader:
            await anext(reader)
        assert job.cgroup is not None
        paths = job.cgroup.paths
        members = Path(paths["pids"], "cgroup.procs") if "pids" in paths else Path(paths["unified"], "job", "cgroup.procs")
        go = Path("/proc", members.read_text().split()[-1], "root/work/go")
        lower_cpus(job.cgroup, DYING_CPUS)
        if how == "its own end":
            await anyio.to_thread.run_sync(go.write_text, "\n")
        else:
            stopping.start_soon(_stop, job, 0 if how == "a kill" else 300)
        # What the command itself still does is under its limit.
        while not job.ended and len(members.read_text().split()) > 250:  # noqa: ASYNC110  # the kernel has no event for it
            await anyio.sleep(0.005)
        before = job.info().usage
        info = await job.wait()
    assert info.end_reason == ("exited" if how == "its own end" else "stopped")
    if before.throttled is None:
        return  # all of it died while we looked away
    assert info.usage.throttled is not None
    # By the machine's own measure of the work, however fast it is: what the limit would have made of it.
    held = (_cpu(info) - before.cpu_user - before.cpu_system) / DYING_CPUS  # type: ignore[operator]
    assert info.usage.throttled - before.throttled < max(0.5, held / 3)


async def _stop(job: RunnerJob, grace: float) -> None:
    with suppress(StopFailed):  # on a slow machine hundreds of processes take longer to die than a stop waits
        await job.stop(grace=grace)


async def test_a_write_limit_holds_for_direct_writes(tmp_path: Path) -> None:
    script = "dd if=/dev/zero of=file bs=1M count=20 oflag=direct 2>/dev/null"
    async with open_runner(tmp_path) as runner:
        free = await run(runner, shell(script, limits=Limits(write_bps=1 << 40)))
        held = await run(runner, shell(script, limits=Limits(write_bps=10 * MIB)))
    assert free.usage.wall is not None
    assert held.usage.wall is not None
    assert free.usage.wall < 1.6 < held.usage.wall < at_most(10)
    assert held.usage.write_bytes is not None
    assert held.usage.write_bytes >= 20 * MIB


@pytest.mark.parametrize("limits", [Limits(write_bps=4096), Limits(write_iops=2)], ids=["bytes", "operations"])
@pytest.mark.parametrize("how", ["a stop", "a deadline"])
async def test_who_waits_for_the_disk_is_ended_all_the_same(tmp_path: Path, limits: Limits, how: str) -> None:
    """Such a process takes no signal, and what it waits for is a quarter of an hour away, or half an hour."""
    script = "dd if=/dev/zero of=synced bs=1M count=4 conv=fsync & dd if=/dev/zero of=direct bs=4k count=4000 oflag=direct"
    timeout = replace(limits, timeout=at_most(2) if how == "a deadline" else None)
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell(script, limits=timeout, grace=0))
        assert job.cgroup is not None
        members = member_directories(job.cgroup)[0] / "cgroup.procs"
        with fail_after(20):
            while not any(waits_for_disk(pid) for pid in members.read_text().split()):  # noqa: ASYNC110  # nobody tells
                await anyio.sleep(0.01)
        with fail_after(10):
            info = await (job.stop(grace=0) if how == "a stop" else job.wait())
    assert info.end_reason == ("stopped" if how == "a stop" else "deadline")


def waits_for_disk(pid: str) -> bool:
    """proc_pid_stat(5)."""
    with suppress(OSError):
        return Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[0] == "D"
    return False


async def test_a_read_limit_holds_for_direct_reads(tmp_path: Path) -> None:
    script = "dd if=/dev/zero of=file bs=1M count=20 oflag=direct && dd if=file of=/dev/null bs=1M iflag=direct"
    async with open_runner(tmp_path) as runner:
        held = await run(runner, shell(script, limits=Limits(read_bps=10 * MIB, write_bps=1 << 40)))
    assert held.usage.wall is not None
    assert 1.6 < held.usage.wall < at_most(10)


async def test_open_files_are_limited(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        _, data = await run_output(runner, shell("ulimit -n", limits=Limits(open_files=123)))
    assert data == b"123\n"


async def test_the_servers_defaults_always_apply(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, JobSpec("true"))
    limits = info.limits
    assert (limits.cpus, limits.memory, limits.pids) == (1.0, 1 << 30, 512)
    assert (limits.read_bps, limits.write_bps) == (100_000_000, 100_000_000)


async def test_what_is_told_of_limits_is_what_the_kernel_has(tmp_path: Path) -> None:
    """In its own numbers: whole pages, whole microseconds of a period."""
    asked = Limits(cpus=0.123456, memory=64 * MIB + 100, pids=77, open_files=99, tmp_size=MIB + 5000, work_size=2 * MIB + 5000)
    asked = replace(asked, read_bps=5_000_001, write_bps=6_000_001, read_iops=1 << 40, write_iops=80)
    script = "ulimit -n; stat -f -c '%b*%S' /tmp /dev/shm /work; exec sleep 600"
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell(script, limits=asked))
        async with job.log() as reader:
            lines = [await reader.next_line() for _ in range(4)]
        assert job.cgroup is not None
        in_kernel, told = limits_in_kernel(job.cgroup), job.info().limits
    files, *sizes = (line.data.decode() for line in lines if line is not None)
    tmp, shm, work = (math.prod(map(int, size.split("*"))) for size in sizes)
    assert {name: getattr(told, name) for name in in_kernel} == in_kernel
    assert (told.open_files, told.tmp_size, told.tmp_size, told.work_size) == (int(files), tmp, shm, work)
    assert (told.cpus, told.memory, told.read_iops) == (0.12346, 64 * MIB, (1 << 32) - 2)


async def test_a_flood_of_output_is_paid_for_by_the_job(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell("exec yes", limits=Limits(cpus=0.2, timeout=3)))
        info = await job.wait()
    assert info.end_reason == "deadline"
    used = info.usage
    assert used.cpu_user is not None
    assert used.cpu_system is not None
    assert used.wall is not None
    assert used.cpu_user + used.cpu_system < 0.15 * used.wall  # the rest of the 0.2 is what its shim, which copies, has used
    assert used.throttled is not None
    assert used.throttled > 0


@pytest.mark.requires("command:mkfs.ext4")
async def test_a_limit_holds_on_every_disk_that_a_job_sees(tmp_path: Path) -> None:
    with KINDS["disk"](tmp_path) as other:
        (other.path / "file").write_bytes(b"x" * 20 * MIB)
        os.sync()
        script = f"dd if={other.path}/file of=/dev/null bs=1M iflag=direct 2>/dev/null"
        async with open_runner(tmp_path, show=(str(other.path),)) as runner:
            held = await run(runner, shell(script, limits=Limits(read_bps=10 * MIB)))
    assert held.status == "completed"
    assert held.usage.wall is not None
    assert held.usage.wall > 1.6
