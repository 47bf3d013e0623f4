"""What becomes of running jobs when jobrunnerd is told to leave: `on_shutdown = stop`. (`keep` is in test_jobrunnerd.py.)"""

from __future__ import annotations

import signal
from pathlib import Path

import anyio.to_thread
import pytest

from jobrunner.config import RunnerConfig
from jobrunner.errors import ConfigError
from jobrunner.job import EndReason, JobInfo
from jobrunner.runner import JobRunner
from jobrunner.settings import load
from tests.service.test_jobrunnerd import ENVIRONMENT, client, daemon, serve_args
from tests.support.crash import assert_exactly
from tests.support.runner import open_runner

STOP = ENVIRONMENT | {"JOBRUNNERD_ON_SHUTDOWN": "stop", "JOBRUNNERD_SHUTDOWN_GRACE": "200ms"}


async def left_behind(path: Path, job_id: str) -> JobInfo:
    async with JobRunner.open(RunnerConfig(state_dir=path / "state")) as runner:
        return (await runner.get(job_id)).info()


@pytest.mark.requires("root")
async def test_jobs_get_their_stop_signal_and_are_told_as_shutdown(tmp_path: Path) -> None:
    async with daemon(*serve_args(tmp_path), env=STOP) as server:
        async with client(tmp_path, await server.line("listening on ")) as admin:
            job = await admin.start("sh", "-c", "trap 'echo goodbye; exit 3' TERM; echo up; while :; do sleep 0.01; done")
            async with job.log() as output:
                assert await output.next_line()
                server.process.send_signal(signal.SIGTERM)
                goodbye = await output.next_line()
                assert goodbye is not None and goodbye.data == b"goodbye\n"
                assert await output.next_line() is None  # the end of the job, not of the connection, which would raise
        assert await server.exit_code() == 0
    info = await left_behind(tmp_path, job.job_id)
    assert (info.end_reason, info.exit_code, info.stopped_by) == (EndReason.SHUTDOWN, 3, "jobrunnerd")


@pytest.mark.requires("root")
async def test_a_job_that_does_not_leave_is_killed_after_the_shutdown_grace_not_after_its_own(tmp_path: Path) -> None:
    async with daemon(*serve_args(tmp_path), env=STOP) as server:
        async with client(tmp_path, await server.line("listening on ")) as admin:
            job = await admin.start("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.01; done", grace=600.0)
            async with job.log() as output:
                assert await output.next_line()
            server.process.send_signal(signal.SIGTERM)
        assert await server.exit_code() == 0
    info = await left_behind(tmp_path, job.job_id)
    assert (info.end_reason, info.signal) == (EndReason.SHUTDOWN, signal.SIGKILL)


@pytest.mark.requires("root")
@pytest.mark.parametrize("word", ["keep", "stop"])
async def test_fifty_jobs_run_on_or_are_all_gone(tmp_path: Path, word: str) -> None:
    settings = STOP | {"JOBRUNNERD_ON_SHUTDOWN": word, "JOBRUNNERD_SHUTDOWN_GRACE": "5s"}
    async with daemon(*serve_args(tmp_path), env=settings) as server:
        async with client(tmp_path, await server.line("listening on ")) as admin:
            jobs = [await admin.start("sleep", "1000") for _ in range(50)]
            server.process.send_signal(signal.SIGTERM)
        assert await server.exit_code() == 0
    ids = [job.job_id for job in jobs]
    await anyio.to_thread.run_sync(assert_exactly, tmp_path / "state", *((ids, []) if word == "keep" else ([], ids)))
    async with open_runner(tmp_path) as runner:
        infos = [(await runner.get(job_id)).info() for job_id in ids]
        assert {info.end_reason for info in infos} == {None if word == "keep" else EndReason.SHUTDOWN}


def test_any_other_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="JOBRUNNERD_ON_SHUTDOWN: 'never' is none of keep, stop"):
        load(None, {"JOBRUNNERD_ON_SHUTDOWN": "never"}, {})
