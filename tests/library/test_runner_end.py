"""Endings: each told as what it was, as soon as it was."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from jobrunner import JobSpec, Limits
from jobrunner.errors import InvalidRequest
from jobrunner.output import Chunk
from jobrunner.runner import JobRunner, RunnerJob
from tests.support.runner import open_runner, output, processes_with, run, shell
from tests.support.timing import at_most, fail_after


async def start_ready(runner: JobRunner, spec: JobSpec) -> RunnerJob:
    """A job that has told that it is ready."""
    with fail_after(10):
        job = await runner.start(spec)
        async with job.log() as reader:
            assert (await anext(reader)) is not None
    return job


async def test_an_exit_code_is_told(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell("exit 42"))
    assert (info.status, info.end_reason, info.exit_code, info.signal) == ("failed", "exited", 42, None)
    assert info.message == "exit code 42"


async def test_a_signal_that_is_not_ours_is_told(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell("kill -SEGV $$"))
    assert (info.status, info.end_reason, info.exit_code, info.signal) == ("failed", "signaled", None, 11)


async def test_stop_ends_a_job_at_once_and_tells_by_whom(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("sleep", ("100",)))
        before = time.monotonic()
        info = await job.stop(by="alice")
        assert time.monotonic() - before < at_most(5)  # the grace period is 10 s
    assert (info.status, info.end_reason, info.signal, info.stopped_by) == ("terminated", "stopped", 15, "alice")


async def test_a_job_that_ignores_the_stop_signal_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await start_ready(runner, shell("trap '' TERM; echo ready; while :; do sleep 0.1; done"))
        before = time.monotonic()
        info = await job.stop(grace=0.5)
        assert 0.5 <= time.monotonic() - before < at_most(5)
    assert (info.status, info.end_reason, info.signal) == ("terminated", "stopped", 9)


async def test_a_job_may_clean_up_within_its_grace_period(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await start_ready(runner, shell("trap 'echo cleaned; exit 3' TERM; echo ready; while :; do sleep 0.05; done"))
        info = await job.stop()
        assert await output(job) == b"ready\ncleaned\n"
    assert (info.status, info.end_reason, info.exit_code) == ("terminated", "stopped", 3)


async def test_the_stop_signal_is_the_jobs_choice(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        spec = shell("trap 'exit 5' INT; trap '' TERM; echo ready; while :; do sleep 0.05; done", stop_signal="INT")
        info = await (await start_ready(runner, spec)).stop()
    assert info.exit_code == 5


async def test_stopping_an_ended_job_changes_nothing(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("true"))
        await job.wait()
        info = await job.stop(by="alice")
    assert (info.status, info.stopped_by) == ("completed", "")


async def test_many_stops_at_once_end_one_job_once(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("sleep", ("100",)))
        infos = await asyncio.gather(*(job.stop() for _ in range(10)))
    assert {info.end_reason for info in infos} == {"stopped"}


async def test_a_second_stop_with_no_grace_does_not_wait_for_the_first_who_is_told_as_who_stopped_it(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await start_ready(runner, shell("trap '' TERM; echo ready; while :; do sleep 0.1; done"))
        first = asyncio.create_task(job.stop(grace=60, by="alice"))
        with fail_after(5):
            while not (runner.state.directory(job.job_id) / "stop").exists():  # noqa: ASYNC110 - the first tells nobody that it is under way
                await asyncio.sleep(0.01)
        with fail_after(5):
            await job.stop(grace=0, by="bob")
            assert (await first).stopped_by == "alice"


async def test_a_grace_period_that_is_none_is_refused(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("sleep", ("100",)))
        with pytest.raises(InvalidRequest, match="grace"):
            await job.stop(grace=-1)


async def test_a_deadline_ends_a_job(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, JobSpec("sleep", ("100",), limits=Limits(timeout=0.3)))
    assert (info.status, info.end_reason) == ("terminated", "deadline")
    assert info.usage.wall is not None
    assert 0.3 <= info.usage.wall < at_most(5)


async def test_silence_ends_a_job_that_has_an_idle_timeout(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        spec = shell("for i in $(seq 16); do echo $i; sleep 0.1; done; sleep 100", limits=Limits(idle_timeout=1.5))
        job = await runner.start(spec)
        assert await output(job) == b"".join(b"%d\n" % number for number in range(1, 17))
        info = await job.wait()
    assert (info.status, info.end_reason) == ("terminated", "idle_timeout")


ESCAPES = {
    "background child": "sleep 1000.{marker} & exit 0",
    "double fork": "( ( sleep 1000.{marker} & ) & ); exit 0",
    "setsid": "setsid sleep 1000.{marker} & sleep 0.1; exit 0",
    "nohup with closed output": "nohup sleep 1000.{marker} >/dev/null 2>&1 & exit 0",
    "deep": "sh -c \"sh -c 'setsid setsid sleep 1000.{marker} & sleep 0.1' & sleep 0.1\" & sleep 0.2; exit 0",
}


@pytest.mark.parametrize("name", list(ESCAPES))
async def test_no_process_outlives_its_job(tmp_path: Path, name: str) -> None:
    marker = f"{time.time_ns() % 10**9}"
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell(ESCAPES[name].format(marker=marker)), seconds=5)
        assert info.status == "completed"
        assert processes_with(f"1000.{marker}") == []


async def test_usage_is_told_while_a_job_runs_and_at_its_end(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await start_ready(runner, shell("echo spinning; while :; do :; done"))
        with fail_after(20):  # ticks tell whose time it was, and they may all fall on the kernel's at first
            while ((usage := job.info().usage).cpu_user or 0) <= 0.05:  # noqa: ASYNC110 - counters tell nobody
                await asyncio.sleep(0.01)
        assert usage.memory is not None
        assert usage.pids is not None
        assert usage.pids >= 2
        info = await job.stop()
    assert info.usage.cpu_user is not None
    assert info.usage.cpu_user > 0.05
    assert info.usage.memory is None
    assert info.usage.memory_peak is not None


async def test_the_last_byte_is_there_when_a_job_ends_right_after_it(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        for _ in range(30):
            job = await runner.start(shell("printf last"))
            parts = []
            with fail_after(10):
                async with job.log() as reader:
                    parts = [part.data async for part in reader if isinstance(part, Chunk)]
            assert b"".join(parts) == b"last"
            assert reader.end is not None
            assert reader.end.info is not None
            assert reader.end.info.status == "completed"
