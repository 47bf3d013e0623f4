"""Faults at the seams: what is not known to be over is never treated as if it were, and nothing runs that nobody knows of."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from jobrunner import JobSpec, StartFailed, launcher
from jobrunner.config import RunnerConfig
from jobrunner.errors import LimitReached, Unavailable
from jobrunner.runner import JobRunner
from jobrunner.shim import binary_path
from jobrunner.shim.stopfile import StopRequest
from jobrunner.statedir import StateDir
from tests.support.runner import cgroup_directories, open_runner, processes_with, run, shell, shims_below

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def helper(tmp_path: Path, script: str) -> Path:
    """A launcher that does what this shell script does; $SHIM is the real one."""
    path = tmp_path / "helper"
    path.write_text(f"#!/bin/sh\nSHIM={binary_path()}\n{script}\n")
    path.chmod(0o755)
    return path


async def test_a_job_whose_shim_cannot_be_reached_is_not_taken_for_dead(tmp_path: Path) -> None:
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        job_id = (await runner.start(JobSpec("sleep", ("100",)))).job_id
    ctl = tmp_path / "state" / "jobs" / job_id / "ctl"
    ctl.rename(ctl.with_name("kept"))
    ctl.symlink_to("ctl")  # opening it gives ELOOP, which says as little about the shim as EMFILE does
    async with open_runner(tmp_path) as runner:
        job = await runner.get(job_id)
        stopping = asyncio.create_task(job.stop())
        await asyncio.sleep(0.2)
        assert str(job.status) == "running"
        ctl.with_name("kept").replace(ctl)
        with anyio.fail_after(10):
            info = await stopping
    assert info.end_reason == "stopped"


async def test_a_running_job_with_a_record_of_another_version_is_left_alone(tmp_path: Path) -> None:
    marker = f"1000.{time.time_ns() % 10**9}"
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        job_id = (await runner.start(JobSpec("sleep", (marker,)))).job_id
    record = tmp_path / "state" / "jobs" / job_id / "job.json"
    written = record.read_text()
    record.write_text(written.replace('"version": 1', '"version": 2'))
    async with open_runner(tmp_path) as runner:
        assert await runner.list() == []
        assert processes_with(marker)
    record.write_text(written)
    async with open_runner(tmp_path) as runner:
        assert (await (await runner.get(job_id)).stop()).end_reason == "stopped"


async def test_a_start_whose_launcher_was_killed_after_the_birth_is_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = helper(tmp_path, "read go <&1; $SHIM > /dev/null; exit 1")
    async with open_runner(tmp_path) as runner:
        monkeypatch.setattr(launcher, "binary_path", lambda: silent)
        job = await runner.start(JobSpec("sleep", ("100",)))
        assert job.info().usage.pids
        assert (await job.stop()).end_reason == "stopped"


async def test_a_start_whose_launcher_was_killed_before_the_birth_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = helper(tmp_path, "kill -KILL $$")
    async with open_runner(tmp_path) as runner:
        monkeypatch.setattr(launcher, "binary_path", lambda: dead)
        with pytest.raises(StartFailed, match="launcher: it was killed"):
            await runner.start(JobSpec("sleep", ("100",)))
        assert await runner.list() == []
        assert list((tmp_path / "state" / "jobs").iterdir()) == []


async def test_a_job_that_fills_the_disk_can_be_stopped_and_its_output_read(small_disk: Path) -> None:
    async with open_runner(small_disk, segment_bytes=1 << 20) as runner:
        job = await runner.start(shell("exec cat /dev/zero"))
        with anyio.fail_after(20):
            while os.statvfs(small_disk).f_bavail:  # noqa: ASYNC110 # nobody tells when a disk is full
                await asyncio.sleep(0.02)
            info = await job.stop(by="alice")
            async with job.log() as reader:
                total = sum([len(part.data) async for part in reader if hasattr(part, "data")])
    assert (info.end_reason, info.stopped_by) == ("stopped", "alice")
    assert 2 << 20 < total <= 4 << 20
    assert reader.end is not None
    assert reader.end.total_bytes >= total


async def test_starts_at_once_do_not_pass_the_bound_together(tmp_path: Path) -> None:
    async with open_runner(tmp_path, max_running=2) as runner:
        starts = [runner.start(JobSpec("sleep", ("100",))) for _ in range(10)]
        results = await asyncio.gather(*starts, return_exceptions=True)
        assert runner.running == 2
    assert sum(isinstance(result, LimitReached) for result in results) == 8


async def test_a_known_request_id_gives_its_job_at_the_bound_too(tmp_path: Path) -> None:
    spec = JobSpec("sleep", ("100",), request_id="r")
    async with open_runner(tmp_path, max_running=1) as runner:
        job = await runner.start(spec)
        assert await runner.start(spec) is job


async def test_no_job_starts_once_all_are_stopped(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("sleep", ("100",)))
        await runner.stop_all(grace=1)
        assert job.info().end_reason == "shutdown"
        with pytest.raises(Unavailable, match="shutting down"):
            await runner.start(JobSpec("true"))


async def test_a_job_whose_shim_was_killed_ended_when_it_was_found_and_stays_so(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("sleep", ("100",)))
        await asyncio.sleep(0.5)
        for pid in shims_below(tmp_path):
            os.kill(pid, 9)
        with anyio.fail_after(10):
            info = await job.wait()
    assert (info.status, info.end_reason) == ("failed", "lost")
    assert info.started is not None
    assert info.ended is not None
    assert info.ended - info.started > 0.4
    async with open_runner(tmp_path) as runner:
        again = (await runner.get(info.job_id)).info()
    assert again.ended == pytest.approx(info.ended, abs=0.01)


async def test_a_list_that_cannot_be_written_is_a_failed_start_and_nothing_is_left(tmp_path: Path) -> None:
    """It has the filter of system calls, and the record has not: between the two is what a file may have here."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with open_runner(tmp_path, job_uids=(1_879_048_192, 2)) as runner:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(runner.calls), limits[1]))
        try:
            with pytest.raises(StartFailed) as failed:
                await runner.start(JobSpec("true"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (failed.value.step, failed.value.errno) == ("launcher", errno.EFBIG)
        assert list(runner.state.jobs.iterdir()) == []
        assert (await run(runner, JobSpec("true"))).exit_code == 0


async def test_a_job_that_never_ran_and_cannot_be_removed_is_the_next_server_s_and_keeps_its_uid(tmp_path: Path) -> None:
    async with open_runner(tmp_path, job_uids=(1_879_048_192, 2)) as runner:  # the first is that of files of workspaces
        job = await runner.start(JobSpec("sleep", ("100",)))
        directory, removed = runner.state.directory(job.job_id), runner.state.removed
        for path in (directory / "exit", *(directory / "log").iterdir()):
            path.unlink()  # as of a shim that died before it let the command go
        removed.rmdir()
        removed.touch()
        for pid in shims_below(tmp_path):
            os.kill(pid, 9)
        with anyio.fail_after(20):
            await job.wait()
            await runner.settled()
        assert (runner.state.running / job.job_id).exists()
        with pytest.raises(LimitReached, match="all 1 uids are of running jobs"):
            await runner.start(JobSpec("true"))
    removed.unlink()
    async with open_runner(tmp_path, job_uids=(1_879_048_192, 2)) as runner:
        assert await runner.list() == []
        assert not directory.exists()
        assert (await run(runner, JobSpec("true"))).exit_code == 0


async def test_what_a_crash_left_of_a_record_is_removed(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        await run(runner, JobSpec("true"))
    left = tmp_path / "state" / "jobs" / "0123456789ab"
    (left / "log").mkdir(parents=True)
    (tmp_path / "state" / "running" / "0123456789ab").touch()
    async with open_runner(tmp_path) as runner:
        assert len(await runner.list()) == 1
    assert not left.exists()
    assert list((tmp_path / "state" / "running").iterdir()) == []
    assert cgroup_directories("0123456789ab") == []


def test_a_later_stop_shortens_the_grace_period_and_nothing_else(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    state.directory("0123456789ab").mkdir()
    state.write_stop("0123456789ab", StopRequest(reason="stopped", signal=15, grace=0.5, by="first"))
    state.write_stop("0123456789ab", StopRequest(reason="shutdown", signal=2, grace=60, by="second"))
    assert state.read_stop("0123456789ab") == StopRequest(reason="stopped", signal=15, grace=0.5, by="first")
    state.close()


async def test_trees_that_take_for_ever_to_take_over_keep_no_start_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the server has threads for everything else."""
    done = threading.Event()
    take_over = StateDir.reown

    def slowly(state: StateDir, job_id: str) -> None:
        done.wait()
        take_over(state, job_id)

    monkeypatch.setattr(StateDir, "reown", slowly)
    async with open_runner(tmp_path) as runner:
        try:
            for _ in range(int(anyio.to_thread.current_default_thread_limiter().total_tokens)):
                await run(runner, JobSpec("touch", ("left",)))
            await run(runner, JobSpec("true"), seconds=10)
        finally:
            done.set()
