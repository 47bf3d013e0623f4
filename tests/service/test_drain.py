"""`jobrunnerd drain`: no new jobs, everything else as ever, and the server leaves with the last one."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from jobrunner.client import ClientJob
from jobrunner.errors import JobRunnerError, Unavailable
from tests.support.daemon import ServerProcess
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

JOBRUNNERD = str(Path(sys.executable).with_name("jobrunnerd"))


def drain(server: ServerProcess) -> subprocess.Popen[str]:
    command = [JOBRUNNERD, "drain", f"--state-dir={server.state}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


async def test_the_server_serves_on_and_leaves_when_the_last_job_has_ended(private_server: ServerProcess) -> None:
    with fail_after(30):
        async with private_server.client() as client:
            job = await client.start("sleep", "100", request_id="r")
            draining = drain(private_server)
            assert draining.stdout is not None
            line = await anyio.to_thread.run_sync(draining.stdout.readline)
            assert line.startswith("draining: 1 jobs run")
            while not (await client.server()).draining:  # noqa: ASYNC110 - the line on ctl is read at some time
                await anyio.sleep(0.01)
            with pytest.raises(Unavailable, match="cannot start job: the server is draining"):
                await client.start("true")
            assert (await client.start("sleep", "100", request_id="r")).job_id == job.job_id
            assert draining.poll() is None
            assert (await job.stop(grace=0)).end_reason == "stopped"
        assert await anyio.to_thread.run_sync(draining.wait) == 0
        assert await anyio.to_thread.run_sync(private_server.process.wait) == 0
    draining.communicate()
    private_server.end()


async def test_a_signal_ends_the_draining_and_a_second_one_the_shutdown_and_the_jobs_run_on(private_server: ServerProcess) -> None:
    with fail_after(30):
        async with private_server.client() as client:
            job = await client.start("sh", "-c", "trap 'echo asked' TERM; echo up; while :; do sleep 0.05; done", grace=60.0)
            draining = drain(private_server)
            assert draining.stdout is not None
            await anyio.to_thread.run_sync(draining.stdout.readline)
            async with job.log() as reader, anyio.create_task_group() as tasks:
                assert await reader.next_line()
                tasks.start_soon(stopped, job)
                assert await reader.next_line()  # the stop is under way, which holds a shutdown up
                private_server.process.send_signal(signal.SIGTERM)
                while b"shutting down" not in private_server.log:  # noqa: ASYNC110 - another process's words
                    await anyio.sleep(0.01)
                assert private_server.process.poll() is None
                private_server.process.send_signal(signal.SIGINT)
                assert await anyio.to_thread.run_sync(private_server.process.wait) == 128 + signal.SIGINT
                tasks.cancel_scope.cancel()
        _, err = await anyio.to_thread.run_sync(draining.communicate)
        assert err == f"jobrunnerd: cannot drain {private_server.state}: the server has left, and 1 jobs run on\n"
    private_server.end()
    await anyio.run_process([JOBRUNNERD, "stop-jobs", f"--state-dir={private_server.state}", "--grace=0"])


async def stopped(job: ClientJob) -> None:
    with suppress(JobRunnerError):
        await job.stop()


async def test_a_server_that_is_killed_is_not_told_as_drained(private_server: ServerProcess) -> None:
    async with private_server.client() as client:
        await client.start("sleep", "100")
    draining = drain(private_server)
    assert draining.stdout is not None
    assert await anyio.to_thread.run_sync(draining.stdout.readline)
    private_server.end(signal.SIGKILL)
    _, err = await anyio.to_thread.run_sync(draining.communicate)
    assert (draining.returncode, err) == (
        3,
        f"jobrunnerd: cannot drain {private_server.state}: the server has left, and 1 jobs run on\n",
    )
    stop = [JOBRUNNERD, "stop-jobs", f"--state-dir={private_server.state}", "--grace=0"]
    await anyio.run_process(stop)


def test_without_a_server_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run([JOBRUNNERD, "drain", f"--state-dir={tmp_path}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, f"jobrunnerd: cannot drain {tmp_path}: no server holds it\n")
