"""Other jobs and the server while one job takes what it can get: they start, run, are heard and stopped as before."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import anyio
import pytest

from jobrunner import JobRunnerError, JobSpec, Limits, StartFailed
from jobrunner.runner import RunnerJob
from tests.hostile.arena import SMALL, Arena, open_arena, program
from tests.support.cgroups import member_directories
from tests.support.timing import fail_after

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.requires("root", "cgroup:memory", "cgroup:pids", "command:python3"),
]

FLOOD = 48 << 20
FOLLOWERS = 4


async def another_job_is_served(arena: Arena) -> None:
    """Started, heard and stopped; and the bystander goes on."""
    with fail_after(10):
        job = await arena.runner.start(JobSpec("/bin/sh", ("-c", "echo up; exec sleep 600")), user="alice")
        async with job.log() as reader:
            line = await reader.next_line()
        info = await job.stop(grace=0.5)
    assert line is not None and line.data == b"up\n"
    assert info.end_reason == "stopped"
    await arena.heartbeat()


async def test_a_fork_bomb_that_goes_on_keeps_nobody_from_anything(arena: Arena) -> None:
    """Its control is the same bomb when its limit is lifted, on a host that has 300 processes: the cgroup of all jobs."""
    bomb = await arena.start(*program("bombs", "fork_for_ever"), limits=Limits(memory=SMALL.memory, pids=100, cpus=1))
    assert bomb.cgroup is not None
    own = next(path for path in member_directories(bomb.cgroup) if (path / "pids.max").exists())
    jobs = next(path for path in own.parents if path.name == "jobs")
    (jobs / "pids.max").write_text("300")
    try:
        await until(own / "pids.current", 100)
        await another_job_is_served(arena)
        (own / "pids.max").write_text("max")
        await until(jobs / "pids.current", 300)
        with pytest.raises(StartFailed, match="Resource temporarily unavailable"):
            await another_job_is_served(arena)
        with fail_after(20):
            info = await bomb.stop(grace=0)
        assert info.end_reason == "stopped"
        await another_job_is_served(arena)
    finally:
        (jobs / "pids.max").write_text("max")


async def until(counter: Path, processes: int) -> None:
    with fail_after(20):
        while int(counter.read_text()) < processes:  # noqa: ASYNC110  # a counter of the kernel's tells nobody
            await anyio.sleep(0.01)


async def follow(job: RunnerJob) -> None:
    """To its end, keeping nothing."""
    async with job.log() as reader:
        async for _ in reader:
            pass


def resident() -> int:
    """Bytes of memory of this process, which is the server here: proc(5)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_flood_that_is_followed_by_many_is_not_felt_by_others(arena: Arena) -> None:
    """Neither in how soon they are heard, nor in the server's memory: what is not read yet is on the disk."""
    await another_job_is_served(arena)
    before = resident()
    flood = await arena.start(*program("bombs", "flood", "100000"), limits=Limits(output_limit=8 << 20))
    async with anyio.create_task_group() as followers:
        for _ in range(FOLLOWERS):
            followers.start_soon(follow, flood)
        stalled = flood.log()
        async with stalled as reader:
            await reader.next_line()  # and then no more
            with fail_after(60):
                while flood.info().log_end < FLOOD:
                    await another_job_is_served(arena)
            grown = resident() - before
            await flood.stop(grace=0)
    assert grown < 32 << 20


async def test_a_flood_leaves_the_disk_to_others(tmp_path: Path) -> None:
    """A small one. The control is the same flood when all of its output is kept."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m,mode=755", "none", tmp_path], check=True)  # noqa: ASYNC221
    try:
        async with open_arena(tmp_path) as arena:
            flood = await arena.start(*program("bombs", "flood", "48"))
            assert (await flood.wait()).log_end >= 48 << 20
            await another_job_is_served(arena)
            greedy = await arena.start(*program("bombs", "flood", "48"), change={"output_limit": None})
            await greedy.wait()
            with pytest.raises((JobRunnerError, OSError), match="No space left"):
                await another_job_is_served(arena)
            await arena.runner.remove(greedy.job_id)
            await another_job_is_served(arena)
    finally:
        subprocess.run(["umount", tmp_path], check=True)  # noqa: ASYNC221
