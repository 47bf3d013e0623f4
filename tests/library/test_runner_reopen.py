"""The state directory is the truth: a runner that is opened again knows every job, running and ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobrunner import JobSpec, Limits
from jobrunner.config import RunnerConfig
from jobrunner.errors import JobNotFound
from jobrunner.runner import JobRunner
from tests.support.runner import cgroup_directories, open_runner, output, run, shell, shims_gone
from tests.support.timing import fail_after


async def test_ended_jobs_are_known_again_with_their_output(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell("echo out; exit 7", name="seven", labels={"a": "b"}), user="alice")
        before = await job.wait()
    async with open_runner(tmp_path) as runner:
        again = await runner.get(job.job_id)
        assert again.info() == before
        assert await output(again) == b"out\n"


async def test_a_running_job_runs_on_and_is_the_same_to_the_next_runner(tmp_path: Path) -> None:
    config = RunnerConfig(state_dir=tmp_path / "state")
    async with JobRunner.open(config) as runner:
        job = await runner.start(shell("echo one; while [ ! -e /proc/1/nosuch ]; do sleep 0.05; done", env={"A": "b"}))
    async with open_runner(tmp_path) as runner:
        again = await runner.get(job.job_id)
        assert again.status == "running"
        assert again.info().usage.pids
        info = await again.stop(by="bob")
        assert (info.end_reason, info.stopped_by) == ("stopped", "bob")
        assert await output(again) == b"one\n"


async def test_a_job_that_ends_while_nobody_watches_is_told_right(tmp_path: Path) -> None:
    config = RunnerConfig(state_dir=tmp_path / "state")
    async with JobRunner.open(config) as runner:
        job = await runner.start(shell("sleep 0.3; echo late; exit 9"))
    await shims_gone(tmp_path)
    async with open_runner(tmp_path) as runner:
        with fail_after(5):
            info = await (await runner.get(job.job_id)).wait()
        assert (info.status, info.exit_code) == ("failed", 9)
        assert await output(await runner.get(job.job_id)) == b"late\n"


async def test_a_deadline_holds_while_no_server_runs(tmp_path: Path) -> None:
    config = RunnerConfig(state_dir=tmp_path / "state")
    async with JobRunner.open(config) as runner:
        job = await runner.start(JobSpec("sleep", ("100",), limits=Limits(timeout=0.3)))
    await shims_gone(tmp_path)
    async with open_runner(tmp_path) as runner:
        with fail_after(5):
            info = await (await runner.get(job.job_id)).wait()
    assert info.end_reason == "deadline"


async def test_a_request_id_still_gives_its_job_after_a_restart(tmp_path: Path) -> None:
    spec = JobSpec("echo", ("x",), request_id="r", env={"SECRET": "value"})
    async with open_runner(tmp_path) as runner:
        first = await runner.start(spec, user="a")
        await first.wait()
    assert b"value" not in (tmp_path / "state" / "jobs" / first.job_id / "job.json").read_bytes()
    async with open_runner(tmp_path) as runner:
        assert (await runner.start(spec, user="a")).job_id == first.job_id
        assert len(await runner.list()) == 1


async def test_a_half_start_is_removed_and_never_runs(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("true"))
        await job.wait()
        directory = runner.state.directory(job.job_id)
    for name in ("ctl", "exit"):  # as a crash between the durable record and the launcher leaves it
        (directory / name).unlink()
    (tmp_path / "state" / "running" / job.job_id).touch()
    async with open_runner(tmp_path) as runner:
        assert await runner.list() == []
        assert not directory.exists()


async def test_a_removed_job_is_gone_for_good(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, JobSpec("true"))
        await runner.remove(info.job_id)
        assert await runner.list() == []
    async with open_runner(tmp_path) as runner:
        assert await runner.list() == []
    assert list((tmp_path / "state" / "jobs").iterdir()) == []


BAD_RECORDS: dict[str, Callable[[str, str], str]] = {
    "cut short": lambda text, _: text[:40],
    "nested without end": lambda _text, _: "[" * 200_000,
    "of another job": lambda text, job_id: text.replace(job_id, "0123456789ab"),
    "of a newer version": lambda text, _: text.replace('"version": 1', '"version": 2'),
    "of a time beyond all calendars": lambda text, _: text.replace('"created": 1', '"created": 1e300, "was": 1'),
    "with a time that is none": lambda text, _: text.replace('"created": 1', '"created": "x", "was": 1'),
    "empty": lambda _text, _: "",
}


@pytest.mark.parametrize("name", list(BAD_RECORDS))
async def test_unreadable_records_are_set_aside_and_hinder_nobody(tmp_path: Path, name: str) -> None:
    async with open_runner(tmp_path) as runner:
        good = await run(runner, JobSpec("true"))
        bad = await run(runner, JobSpec("true"))
        path = runner.state.directory(bad.job_id) / "job.json"
    text = path.read_text()
    path.write_text(BAD_RECORDS[name](text, bad.job_id))
    assert path.read_text() != text
    async with open_runner(tmp_path) as runner:
        assert [job.job_id for job in await runner.list()] == [good.job_id]
        with pytest.raises(JobNotFound):
            await runner.get(bad.job_id)
    assert not path.exists()
    corrupt = tmp_path / "state" / "corrupt"
    assert (corrupt / bad.job_id / "job.json").exists()
    assert "job.json" in (corrupt / f"{bad.job_id}.why").read_text()


async def test_a_stop_that_cannot_be_read_hinders_nobody(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, JobSpec("true"))
        (runner.state.directory(info.job_id) / "stop").mkdir()
    async with open_runner(tmp_path) as runner:
        assert (await runner.get(info.job_id)).info() == info


async def test_nothing_is_left_of_a_runner_that_is_closed(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        await run(runner, shell(f"echo {time.time()}"))
        job_ids = [job.job_id for job in await runner.list()]
    for job_id in job_ids:
        assert cgroup_directories(job_id) == []
