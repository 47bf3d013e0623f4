"""What is not as jobrunner writes it: told, set aside, and never taken for something else."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from jobrunner import JobSpec
from jobrunner.config import RunnerConfig
from jobrunner.errors import JobNotFound
from jobrunner.job import Gap
from jobrunner.linux.check import Level, everything
from jobrunner.runner import JobRunner
from jobrunner.sandbox import needs
from tests.support.runner import open_runner, output, run, shell
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")


def symlink(jobs: Path) -> None:
    (jobs / "0123456789ab").symlink_to(next(jobs.iterdir()))


FOREIGN: dict[str, Callable[[Path], object]] = {
    "lost+found": lambda jobs: (jobs / "lost+found").mkdir(),
    "0123456789ab": symlink,
    "a file.txt": lambda jobs: (jobs / "a file.txt").write_text("mine"),
    "abcdefabcdef": lambda jobs: os.mkfifo(jobs / "abcdefabcdef"),
    "0123456789AB": lambda jobs: (jobs / "0123456789AB" / "log").mkdir(parents=True),
}


async def test_what_is_no_job_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_runner(tmp_path) as runner:
        good = await run(runner, JobSpec("true"))
    for make in FOREIGN.values():
        make(tmp_path / "state" / "jobs")
    (tmp_path / "state" / "running" / "ffffffffffff").mkdir()
    async with open_runner(tmp_path) as runner:
        assert [job.info() for job in await runner.list()] == [good]
        for name in FOREIGN:
            with pytest.raises(JobNotFound):
                await runner.get(name)
    corrupt = tmp_path / "state" / "corrupt"
    for name in (*FOREIGN, "ffffffffffff"):
        assert os.path.lexists(corrupt / name)
        assert name in (corrupt / f"{name}.why").read_text()
        assert f"corrupt/{name}" in caplog.text
    assert os.listdir(tmp_path / "state" / "jobs") == [good.job_id]
    findings = everything(needs(RunnerConfig(state_dir=tmp_path / "state")))
    (told,) = (finding for finding in findings if finding.name == "state directory")
    assert (told.level, "6 files or directories" in told.what) == (Level.LIMITED, True)


async def test_two_things_of_one_name_are_both_kept(tmp_path: Path) -> None:
    jobs = tmp_path / "state" / "jobs"
    for text in ("one", "two"):
        async with open_runner(tmp_path):
            pass
        (jobs / "notes").write_text(text)
    async with open_runner(tmp_path):
        pass
    assert [
        (tmp_path / "state" / "corrupt" / name).read_text()
        for name in ("notes", "notes.0", "notes.1")
        if (tmp_path / "state" / "corrupt" / name).exists()
    ] == ["one", "two"]


async def test_a_damaged_exit_record_is_told_as_an_unknown_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell("echo out; exit 3"))
        path = runner.state.directory(info.job_id) / "exit"
    for damage in (b"", b"garbage", os.urandom(512)):
        path.write_bytes(damage)
        async with open_runner(tmp_path) as runner:
            job = await runner.get(info.job_id)
            assert (job.info().end_reason, job.info().exit_code) == ("lost", None)
            assert await output(job) == b"out\n"
    assert f"cannot read {path}" in caplog.text


async def test_an_exit_record_of_a_newer_version_is_not_guessed_at(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, JobSpec("true"))
        path = runner.state.directory(info.job_id) / "exit"
    raw = path.read_bytes()
    newer = raw[:6] + struct.pack("<H", 2) + raw[8:-4]
    path.write_bytes(newer + zlib.crc32(newer).to_bytes(4, "little"))
    async with open_runner(tmp_path) as runner:
        assert await runner.list() == []
    assert "newer" in (tmp_path / "state" / "corrupt" / f"{info.job_id}.why").read_text()


async def test_a_short_index_and_a_missing_end_are_a_gap(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell("echo one; sleep 0.1; echo two"))
        (index,) = (runner.state.directory(info.job_id) / "log").glob("*.idx")
    index.write_bytes(index.read_bytes()[:45])
    async with open_runner(tmp_path) as runner:
        job = await runner.get(info.job_id)
        with fail_after(10):
            async with job.log() as reader:
                parts = [part async for part in reader]
        assert b"".join(part.data for part in parts if not isinstance(part, Gap)) == b"one\n"
        assert [(part.first, part.last) for part in parts if isinstance(part, Gap)] == [(4, 7)]
        assert job.info().log_end == 8


async def test_a_marker_that_was_lost_loses_no_job(tmp_path: Path) -> None:
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        job = await runner.start(JobSpec("sleep", ("100",)))
    (tmp_path / "state" / "running" / job.job_id).unlink()
    async with open_runner(tmp_path) as runner:
        again = await runner.get(job.job_id)
        assert again.status == "running"
        assert (await again.stop()).end_reason == "stopped"


async def test_a_work_directory_that_a_crash_left_the_jobs_own_becomes_roots(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell("mkdir /work/inner; echo x > /work/inner/file"))
        work = runner.state.directory(info.job_id) / "work"
    for path in (work, work / "inner", work / "inner" / "file"):
        os.chown(path, 54321, 54321)
    async with open_runner(tmp_path):
        pass
    assert [path.stat().st_uid for path in (work, work / "inner", work / "inner" / "file")] == [0, 0, 0]


async def test_a_removal_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, JobSpec("true"))
        runner.state.directory(info.job_id).rename(runner.state.removed / info.job_id)
    async with open_runner(tmp_path) as runner:
        assert await runner.list() == []
    assert os.listdir(tmp_path / "state" / "removed") == []


@pytest.mark.parametrize("name", ["jobs", "running", "lock", "corrupt"])
async def test_a_state_directory_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    from jobrunner.errors import HostError

    (tmp_path / "state").mkdir()
    place = tmp_path / "state" / name
    place.mkdir() if name == "lock" else place.write_text("x")
    with pytest.raises(HostError, match="cannot use state directory"):
        async with open_runner(tmp_path):
            pass
