"""Ended jobs are kept by count, age and bytes: the oldest goes first, and none that is read or runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import anyio
import pytest

from jobrunner import JobSpec
from jobrunner.job import JobStatus
from jobrunner.kept import Entry, Jobs
from jobrunner.runner import JobRunner
from tests.support.runner import open_runner, run, shell
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")


async def left(runner: JobRunner, count: int) -> list[str]:
    """Ids of the jobs when there are so many, oldest first."""
    with fail_after(10):
        while len(await runner.list()) != count:  # noqa: ASYNC110 - removal is told to nobody
            await anyio.sleep(0.01)
    return [job.job_id for job in reversed(await runner.list())]


async def test_past_the_count_the_first_that_ended_goes(tmp_path: Path) -> None:
    async with open_runner(tmp_path, keep_jobs=2) as runner:
        running = await runner.start(JobSpec("sleep", ("100",)))
        jobs = [(await run(runner, JobSpec("true"))).job_id for _ in range(4)]
        assert await left(runner, 3) == [running.job_id, *jobs[2:]]
    assert sorted(os.listdir(tmp_path / "state" / "jobs")) == sorted([running.job_id, *jobs[2:]])
    assert os.listdir(tmp_path / "state" / "removed") == []


async def test_past_the_bytes_the_first_that_ended_goes(tmp_path: Path) -> None:
    async with open_runner(tmp_path, keep_bytes=250_000) as runner:
        jobs = [(await run(runner, shell("head -c 100000 /dev/zero"))).job_id for _ in range(4)]
        assert await left(runner, 2) == jobs[2:]


async def test_a_job_that_is_read_stays_until_it_is_not(tmp_path: Path) -> None:
    async with open_runner(tmp_path, keep_jobs=0) as runner:
        job = await runner.start(shell("echo kept; sleep 0.3"))
        async with job.log() as reader:
            line = await reader.next_line()
            await job.wait()
            await run(runner, JobSpec("true"))
            assert await left(runner, 1) == [job.job_id]
            assert line is not None and line.data == b"kept\n"
            assert await reader.next_line() is None
        await run(runner, JobSpec("true"))  # an end is when it is looked again, at the latest after LOOK
        await left(runner, 0)


async def test_what_is_too_old_goes_after_a_restart(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        await run(runner, JobSpec("true"))
    await anyio.sleep(0.05)
    async with open_runner(tmp_path, keep_age=0.01) as runner:
        await left(runner, 0)


def test_the_list_keeps_its_orders_while_jobs_come_and_go() -> None:
    jobs = Jobs()
    for number in range(5):
        jobs.add(Entry(f"{number:012x}", float(number)))
    for number in (3, 1, 4):
        jobs.end(f"{number:012x}", JobStatus.FAILED, 100.0 - number, 10)
    assert [entry.created for entry in jobs.first_ended()] == [4, 3, 1]
    seen = []
    for entry in jobs.newest_first():
        seen.append(entry.created)
        jobs.remove(f"{int(entry.created) - 1:012x}")
    assert seen == [4, 2, 0]
    assert (len(jobs), jobs.ended, jobs.size) == (3, 1, 10)


def test_an_entry_that_may_not_have_a_label_is_told() -> None:
    from jobrunner.kept import hash_labels

    entry = Entry("0" * 12, time.time(), labels=hash_labels({"a": "1", "b": "2"}))
    assert [entry.may_have(labels) for labels in ({}, {"a": "1"}, {"a": "1", "b": "2"}, {"a": "2"}, {"c": "1"})] == [
        True,
        True,
        True,
        False,
        False,
    ]
