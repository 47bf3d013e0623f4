"""A start that is asked for again happens once: at the same time, after a restart, and after its job was removed."""

from __future__ import annotations

import asyncio
import time
import zlib
from pathlib import Path

import pytest

from jobrunner import JobSpec, Limits
from jobrunner.config import RunnerConfig
from jobrunner.errors import JobNotFound, JobRemoved, RequestConflict, Unavailable
from jobrunner.record import fingerprint
from jobrunner.requests import KEEP, RequestIds, request_key
from jobrunner.runner import JobRunner
from tests.support.keptjobs import multiply
from tests.support.runner import open_runner

pytestmark = pytest.mark.requires("root")

ONCE = JobSpec("true", request_id="once")


async def test_starts_at_the_same_time_are_one_job(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        jobs = await asyncio.gather(*(runner.start(ONCE, user="a") for _ in range(10)))
        assert len({job.job_id for job in jobs}) == 1
        assert len(await runner.list()) == 1


async def test_ids_are_the_users_own(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        jobs = [await runner.start(ONCE, user=user) for user in ("a", "b", "")]
    assert len({job.job_id for job in jobs}) == 3


async def test_another_request_under_the_same_id_is_refused_after_a_restart_and_a_removal_too(tmp_path: Path) -> None:
    other = JobSpec("true", ("x",), request_id="once")
    async with open_runner(tmp_path) as runner:
        job = await runner.start(ONCE)
        await job.wait()
    async with open_runner(tmp_path) as runner:
        with pytest.raises(RequestConflict):
            await runner.start(other)
        await runner.remove(job.job_id)
        with pytest.raises(RequestConflict):
            await runner.start(other)
    async with open_runner(tmp_path) as runner:
        with pytest.raises(RequestConflict):
            await runner.start(other)


async def test_a_removed_job_is_not_started_again_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(ONCE)
        await job.wait()
        await runner.remove(job.job_id)
        with pytest.raises(JobRemoved, match=job.job_id):
            await runner.start(ONCE)
    async with open_runner(tmp_path) as runner:
        with pytest.raises(JobRemoved):
            await runner.start(ONCE)
        with pytest.raises(JobNotFound):
            await runner.get(job.job_id)
        later = time.time() + KEEP + 1
        monkeypatch.setattr("jobrunner.requests.time.time", lambda: later)
        assert (await runner.start(ONCE)).job_id != job.job_id


async def test_a_clock_that_was_set_back_forgets_no_request_id_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(ONCE)
        await job.wait()
        await runner.remove(job.job_id)
    true = time.time()
    for now in (true - 3600, true - 100 * KEEP, true - 100 * KEEP + KEEP - 60):
        monkeypatch.setattr("jobrunner.requests.time.time", lambda now=now: now)
        async with open_runner(tmp_path) as runner:
            with pytest.raises(JobRemoved):
                await runner.start(ONCE)
    monkeypatch.setattr("jobrunner.requests.time.time", lambda: true - 100 * KEEP + KEEP + 60)
    async with open_runner(tmp_path) as runner:
        assert (await runner.start(ONCE)).job_id != job.job_id


async def test_the_record_keeps_its_request_id_whatever_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(ONCE)
        await job.wait()
    later = time.time() + 10 * KEEP
    monkeypatch.setattr("jobrunner.requests.time.time", lambda: later)
    async with open_runner(tmp_path) as runner:
        assert (await runner.start(ONCE)).job_id == job.job_id


async def test_duplicates_that_come_while_the_ids_are_loaded_are_one_job_of_each_user(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        first = await runner.start(JobSpec("true"))
        await first.wait()
        before = await runner.start(ONCE, user="a")
        await before.wait()
    multiply(tmp_path / "state", first.job_id, 300)
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state"), wait=False) as runner:
        assert not runner.catalog.loaded.is_set()
        starts = [runner.start(ONCE, user=user) for user in ("a", "b") for _ in range(5)]
        ids = [job.job_id for job in await asyncio.gather(*starts)]
        assert set(ids[:5]) == {before.job_id}
        assert len(set(ids[5:])) == 1 and ids[5] != ids[0]


async def test_a_start_that_failed_may_be_asked_for_again(tmp_path: Path) -> None:
    spec = JobSpec("/nosuch", request_id="once")
    async with open_runner(tmp_path) as runner:
        for _ in range(2):
            with pytest.raises(Exception, match="exec"):
                await runner.start(spec)
        assert (await runner.start(ONCE)).job_id


async def test_a_start_that_waits_for_request_ids_when_the_runner_closes_is_none(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("true"))
        await job.wait()
    multiply(tmp_path / "state", job.job_id, 300)
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state"), wait=False) as runner:
        waiting = asyncio.create_task(runner.start(JobSpec("true", request_id="new")))
        await asyncio.sleep(0)
        assert not waiting.done()
    with pytest.raises(Unavailable):
        await waiting
    assert len(list((tmp_path / "state" / "jobs").iterdir())) == 301


async def test_a_record_that_is_damaged_while_the_server_runs_is_told_once_and_set_aside(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        good, bad = [await runner.start(JobSpec("true")) for _ in range(2)]
        ids = [job.job_id for job in (good, bad)]
        for job in (good, bad):
            await job.wait()
        (runner.state.directory(ids[1]) / "job.json").write_text("{")
        runner.catalog._handles.clear()  # as if nobody held them: the record is what is asked
        assert [job.job_id for job in await runner.list()] == ids[:1]
        assert ids[1] not in runner.catalog.jobs
    assert (tmp_path / "state" / "corrupt" / ids[1]).exists()


def test_damaged_lines_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, keys = tmp_path / "requests", [request_key("u", str(number)) for number in range(3)]
    ids = RequestIds(path)
    for number, key in enumerate(keys):
        ids.remember(key, fingerprint(ONCE), f"{number:012x}")
    ids.append(keys, time.time())
    lines = path.read_bytes().splitlines(keepends=True)
    other = b"1 key 000000000000 fingerprint now"  # as nobody writes it, and with its checksum
    path.write_bytes(lines[0] + lines[1][:30] + b"\n\xff\xfe\n%s %08x\n" % (other, zlib.crc32(other)) + lines[2][:-3])
    again = RequestIds(path)
    again.load()
    assert [again.find(key) is not None for key in keys] == [True, False, False]
    assert "4 lines" in caplog.text
    assert path.read_bytes() == lines[0]


def test_what_is_at_its_default_is_not_part_of_the_request() -> None:
    assert fingerprint(JobSpec("x", request_id="a")) == fingerprint(JobSpec("x", (), limits=Limits(), request_id="b"))
    different = [JobSpec("x", ("y",)), JobSpec("x", env={"A": "1"}), JobSpec("x", limits=Limits(pids=9)), JobSpec("y")]
    assert len({fingerprint(spec) for spec in [JobSpec("x"), *different]}) == 5
