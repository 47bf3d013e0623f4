"""What is not as jobrunner writes it: told, set aside, and never taken for something else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from jobrunner import JobSpec
from jobrunner.config import RunnerConfig
from jobrunner.errors import HostError, JobNotFound, JobRemoved, LimitReached, OffsetOutOfRange
from jobrunner.job import Gap
from jobrunner.linux.check import Level, everything
from jobrunner.output import Chunk
from jobrunner.runner import JobRunner
from jobrunner.sandbox import needs
from tests.support.flags import chattr, flags_lifted
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


@pytest.mark.requires("command:chattr")
async def test_a_uid_is_nobodys_before_what_its_last_job_left_is_roots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Over restarts too, and without the job's record: here is a file that nobody can take over, until somebody lets go of it."""
    one_uid = {"job_uids": (0x6FFF0001, 1)}
    with flags_lifted(tmp_path):
        async with open_runner(tmp_path, **one_uid) as runner:
            job = await runner.start(shell("mkdir /work/d; echo x > /work/d/f; sleep 100"))
            file = runner.state.directory(job.job_id) / "work" / "d" / "f"
            with fail_after(10):
                while not file.exists():  # noqa: ASYNC110 - a job tells nobody what it writes
                    await asyncio.sleep(0.01)
            chattr("+i", file)
            assert (await job.stop(grace=0)).end_reason == "stopped"
            with pytest.raises(LimitReached, match="all 1 uids"):
                await runner.start(JobSpec("true"))
            await runner.settled()
        assert os.listdir(tmp_path / "state" / "leaving") == [job.job_id]
        async with open_runner(tmp_path, **one_uid) as runner:
            assert (await runner.get(job.job_id)).info().end_reason == "stopped"
            with pytest.raises(LimitReached, match="all 1 uids"):
                await runner.start(JobSpec("true"))
            await runner.settled()
        assert "its uid stays taken" in caplog.text
    async with open_runner(tmp_path, **one_uid) as runner:
        await runner.settled()
        assert {path.lstat().st_uid for path in (file, file.parent, file.parent.parent)} == {0}
        assert (await run(runner, JobSpec("true"))).exit_code == 0
    assert os.listdir(tmp_path / "state" / "leaving") == []


@pytest.mark.parametrize("name", ["", "job.json"])
async def test_what_belongs_to_another_user_is_not_believed(tmp_path: Path, name: str) -> None:
    async with open_runner(tmp_path) as runner:
        good, bad = await run(runner, JobSpec("true")), await run(runner, JobSpec("true"))
        os.chown(runner.state.directory(bad.job_id) / name, 1000, 1000)
    async with open_runner(tmp_path) as runner:
        assert [job.job_id for job in await runner.list()] == [good.job_id]
    assert "belongs to uid 1000" in (tmp_path / "state" / "corrupt" / f"{bad.job_id}.why").read_text()


@pytest.mark.parametrize("mode", [0o777, 0o720, 1000])
async def test_a_state_directory_that_others_could_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    os.chown(tmp_path / "state", *((1000, 1000) if mode == 1000 else (0, 0)))
    if mode != 1000:
        (tmp_path / "state").chmod(mode)
    with pytest.raises(HostError, match="cannot use state directory .*: (it belongs to uid 1000|other users may write to it)"):
        async with open_runner(tmp_path):
            pass
    assert os.listdir(tmp_path / "state") == []


async def test_links_in_place_of_files_lead_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of jobs that ended, and of one that runs: what the links point at is neither read, nor written, nor re-owned, nor removed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("job.json", "exit", "ctl", "stop", "ctl.file"):
        (outside / name).write_text("secret\n")
        os.chown(outside / name, 1000, 1000)
    async with open_runner(tmp_path) as runner:
        jobs = {
            name: await run(runner, shell("echo out; exit 3")) for name in ("job.json", "exit", "stop", "log", "work", "segment")
        }
        state = runner.state
    for name, info in jobs.items():
        directory = state.directory(info.job_id)
        place = next((directory / "log").glob("*[0-9a-f]")) if name == "segment" else directory / name
        place.rename(tmp_path / f"kept-{name}") if os.path.lexists(place) else None
        place.symlink_to(outside / "job.json" if name == "segment" else outside if name in ("log", "work") else outside / name)
        (state.leaving / info.job_id).touch()
    for name in ("corrupt/evil.why", "jobs/evil.why"):
        (tmp_path / "state" / name).symlink_to(outside / "exit")
    (tmp_path / "state" / "jobs" / "evil").write_text("x")
    before = {path.name: (path.read_bytes(), path.stat().st_uid) for path in outside.iterdir()}
    async with open_runner(tmp_path) as runner:
        await runner.settled()
        told = {job.job_id: job for job in await runner.list()}
        assert jobs["job.json"].job_id not in told
        assert told[jobs["exit"].job_id].info().end_reason == "lost"
        for name in ("stop", "work"):
            assert told[jobs[name].job_id].info().exit_code == 3
        assert await output(told[jobs["log"].job_id]) == b""
        with pytest.raises(HostError, match="cannot read log of job .*: Too many levels of symbolic links"):
            await output(told[jobs["segment"].job_id])
        for job_id in told:
            await runner.remove(job_id)
    assert {path.name: (path.read_bytes(), path.stat().st_uid) for path in outside.iterdir()} == before
    assert os.listdir(tmp_path / "state" / "jobs") == []


async def test_a_running_job_whose_files_are_links_is_left_alone_and_lives(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        job = await runner.start(shell("sleep 100"))
    directory = tmp_path / "state" / "jobs" / job.job_id
    (directory / "ctl").rename(directory / "kept")
    (directory / "ctl").symlink_to(outside)
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        assert (await runner.get(job.job_id)).status == "running"
    assert outside.read_text() == "mine\n"
    (directory / "kept").replace(directory / "ctl")
    (directory / "job.json").rename(directory / "kept")
    async with open_runner(tmp_path) as runner:  # a record that is missing is no start that was cut short
        assert await runner.list() == []
    (directory / "kept").rename(directory / "job.json")
    async with open_runner(tmp_path) as runner:
        assert (await (await runner.get(job.job_id)).stop()).end_reason == "stopped"


async def test_a_job_whose_record_is_missing_is_set_aside_and_not_removed(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell("echo out"))
        (runner.state.directory(info.job_id) / "job.json").unlink()
    async with open_runner(tmp_path) as runner:
        assert await runner.list() == []
    assert (tmp_path / "state" / "corrupt" / info.job_id / "log").is_dir()


async def test_a_job_whose_exit_record_is_missing_is_lost_and_keeps_its_output(tmp_path: Path) -> None:
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        ended = await run(runner, shell("echo out"))
        running = await runner.start(shell("echo out; sleep 0.3"))
        async with running.log() as reader:
            assert await reader.next_line()
        for job_id in (ended.job_id, running.job_id):
            (runner.state.directory(job_id) / "exit").unlink()
    async with open_runner(tmp_path) as runner:
        for job_id in (ended.job_id, running.job_id):
            job = await runner.get(job_id)
            with fail_after(10):
                assert (await job.wait()).end_reason == "lost"
            assert await output(job) == b"out\n"


@pytest.mark.parametrize("kind", ["directory", "fifo", "link", "another user's"])
async def test_requests_that_are_no_file_of_ours_are_set_aside(tmp_path: Path, kind: str) -> None:
    async with open_runner(tmp_path) as runner:
        await run(runner, JobSpec("true"))
    requests, outside = tmp_path / "state" / "requests", tmp_path / "outside"
    outside.write_text("mine\n")
    make: dict[str, Callable[[], object]] = {
        "directory": requests.mkdir,
        "fifo": lambda: os.mkfifo(requests),
        "link": lambda: requests.symlink_to(outside),
        "another user's": requests.touch,
    }
    make[kind]()
    os.chown(requests, *((1000, 1000) if kind == "another user's" else (0, 0)), follow_symlinks=False)
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("true", request_id="r"))
        await job.wait()
        await runner.remove(job.job_id)
    assert (tmp_path / "state" / "corrupt" / "requests.why").exists()
    assert outside.read_text() == "mine\n"
    async with open_runner(tmp_path) as runner:
        with pytest.raises(JobRemoved):
            await runner.start(JobSpec("true", request_id="r"))


async def test_an_index_of_garbage_gives_an_end_and_no_byte_that_was_not_written(tmp_path: Path) -> None:
    """Cut, overwritten, followed by zeros or by noise, as disks do it: each selection ends."""
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell("for i in 1 2 3 4 5 6; do echo line $i; echo line $i >&2; sleep 0.005; done"))
        (index,) = (runner.state.directory(info.job_id) / "log").glob("*.idx")
    whole, written = index.read_bytes(), index.with_suffix("").read_bytes()
    choice = random.Random("garbage")
    for _ in range(40):
        at, noise = choice.randrange(len(whole)), choice.randbytes(choice.randrange(1, 100))
        damaged = [whole[:at], whole[:at] + noise + whole[at + len(noise) :], whole[:at] + bytes(99), whole + noise]
        index.write_bytes(choice.choice(damaged))
        async with open_runner(tmp_path) as runner:
            job = await runner.get(info.job_id)
            for options in ({}, {"tail": 2}, {"since": 0.0}, {"offset": 10}, {"follow": False}):
                with fail_after(10), contextlib.suppress(OffsetOutOfRange):
                    async with job.log(**options) as reader:
                        parts = [part async for part in reader]
                    assert all(part.data == written[part.offset :][: len(part.data)] for part in parts if isinstance(part, Chunk))


async def test_zeros_after_the_last_record_that_was_synced_hide_nothing(tmp_path: Path) -> None:
    """What ext4 leaves where the power fails after the end was told: room for the record END, which is not synced."""
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell("echo one; sleep 0.1; echo two"))
        (index,) = (runner.state.directory(info.job_id) / "log").glob("*.idx")
    for zeros in (32, 4096, 45):
        index.write_bytes(index.read_bytes()[:64] + bytes(zeros))
        async with open_runner(tmp_path) as runner:
            job = await runner.get(info.job_id)
            for options in ({}, {"tail": 2}, {"since": 0.0}, {"follow": False}):
                async with job.log(**options) as reader:
                    parts = [part async for part in reader]
                assert [part.data for part in parts if isinstance(part, Chunk)] == [b"one\n", b"two\n"]
                assert len(parts) == 2
            assert (job.info().log_start, job.info().log_end) == (0, 8)


async def test_foreign_files_in_a_log_are_passed_over(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell("echo out"))
        log = runner.state.directory(info.job_id) / "log"
    for name in ("notes", "zzzzzzzzzzzzzzzz.idx", "000000000000000G.idx", ".nfs0001", "0000.idx"):
        (log / name).write_text("x")
    async with open_runner(tmp_path) as runner:
        assert await output(await runner.get(info.job_id)) == b"out\n"


async def test_a_removal_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info = await run(runner, JobSpec("true"))
        runner.state.directory(info.job_id).rename(runner.state.removed / info.job_id)
    async with open_runner(tmp_path) as runner:
        assert await runner.list() == []
    assert os.listdir(tmp_path / "state" / "removed") == []


@pytest.mark.parametrize("name", ["jobs", "running", "leaving", "lock", "corrupt"])
async def test_a_state_directory_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "state").mkdir()
    place = tmp_path / "state" / name
    place.mkdir() if name == "lock" else place.write_text("x")
    with pytest.raises(HostError, match="cannot use state directory"):
        async with open_runner(tmp_path):
            pass


async def test_a_record_of_other_types_hides_no_other_job(tmp_path: Path) -> None:
    """JSON that parses, and has in one place after the other what is of no such type there."""
    async with open_runner(tmp_path) as runner:
        good, bad = await run(runner, JobSpec("true")), await run(runner, JobSpec("true", request_id="once"))
    for part, name, value in (
        ("", "user", 5),
        ("", "node", {}),
        ("", "fingerprint", 7),
        ("", "work", ["x"]),
        ("", "cgroup", ["x"]),
        ("", "uid", float("inf")),
        ("", "created", 10**400),
        ("spec", "name", None),
        ("spec", "writable", {}),
    ):
        path = tmp_path / "state" / "jobs" / bad.job_id / "job.json"
        whole = json.loads(path.read_text())
        (whole[part] if part else whole)[name] = value
        before, _ = path.read_text(), path.write_text(json.dumps(whole))
        async with open_runner(tmp_path) as runner:
            assert [job.info() for job in await runner.list()] == [good], (part, name)
        aside = tmp_path / "state" / "corrupt" / bad.job_id
        assert "damaged" in aside.with_name(f"{bad.job_id}.why").read_text()
        aside.rename(path.parent)
        aside.with_name(f"{bad.job_id}.why").unlink()
        path.write_text(before)
