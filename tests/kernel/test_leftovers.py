"""Nothing is left after many jobs: processes, cgroups, mounts, file descriptors, threads, tasks."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import anyio
import pytest

from jobrunner import JobSpec, Limits, StartFailed
from tests.support.runner import cgroup_directories, open_runner, run, shell
from tests.support.timing import FACTOR

JOBS = int(os.environ.get("JOBRUNNER_TEST_JOBS", "200" if FACTOR == 1 else "40"))
"""A multiple of 40. By hand: JOBRUNNER_TEST_JOBS=1000."""
KINDS = [
    shell("echo out; echo err >&2"),
    shell("exit 3"),
    shell("kill -KILL $$"),
    shell("setsid sleep 1000 & exit 0"),
    JobSpec("sleep", ("100",), limits=Limits(timeout=0.05)),
    JobSpec("/no/such/command"),
    shell("head -c 300000 /dev/urandom"),
    JobSpec("sleep", ("100",)),
]


def state(directory: Path) -> dict[str, object]:
    """Of this process and of what works below the directory: other servers may run on this host."""
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "mounts": [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line],
        "shims": [pid for pid in os.listdir("/proc") if pid.isdigit() and works_below(pid, directory)],
        "zombies": [pid for pid in os.listdir("/proc") if pid.isdigit() and is_my_zombie(pid)],
        "tasks": len(asyncio.all_tasks()),
    }


def kept(directory: Path) -> set[str]:
    """A directory for each job that has ended, and nothing beside them."""
    return set(os.listdir(directory / "state" / "jobs"))


def works_below(pid: str, directory: Path) -> bool:
    """A shim's working directory is its job's."""
    try:
        return Path("/proc", pid, "cwd").readlink().is_relative_to(directory)
    except OSError:
        return False


def is_my_zombie(pid: str) -> bool:
    try:
        fields = Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return False
    return fields[0] == "Z" and fields[1] == str(os.getpid())


@pytest.mark.timeout(600)
async def test_nothing_is_left_after_many_jobs(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        first = await run(runner, JobSpec("true"))
        await anyio.wait_all_tasks_blocked()
        before = state(tmp_path)

        async def one(number: int) -> str | None:
            try:
                job = await runner.start(KINDS[number % len(KINDS)])
            except StartFailed:
                return None
            if number % len(KINDS) == len(KINDS) - 1:
                await job.stop(grace=0.1)
            await job.wait()
            return job.job_id

        sleeper = await runner.start(JobSpec("sleep", ("100",)))
        assert len(state(tmp_path)["shims"]) == 1  # type: ignore[arg-type]  # what is counted is found
        await sleeper.stop(grace=0)
        job_ids: list[str | None] = []
        for start in range(0, JOBS, 20):
            job_ids += await asyncio.gather(*(one(number) for number in range(start, start + 20)))
        await runner.settled()  # uids are given back after the end is told
        await anyio.wait_all_tasks_blocked()
        assert state(tmp_path) == before
        assert kept(tmp_path) == {job_id for job_id in job_ids if job_id} | {first.job_id, sleeper.job_id}
        assert len([job_id for job_id in job_ids if job_id]) == JOBS * 7 // 8
        directories = {path.rsplit("/", 1)[-1] for path in cgroup_directories("jobs")}
        assert directories.isdisjoint({job_id for job_id in job_ids if job_id})
        assert list((tmp_path / "state" / "running").iterdir()) == []
        assert threading.active_count() < 50
        for job_id in kept(tmp_path):
            await runner.remove(job_id)
        assert (kept(tmp_path), state(tmp_path)) == (set(), before)
        assert list((tmp_path / "state" / "removed").iterdir()) == []
