"""`jobrunnerd stop-jobs`: ends what runs on while no server does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from jobrunner import JobInfo, JobSpec
from tests.support.daemon import ServerProcess, server_process
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root")


def stop_jobs(state: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("jobrunnerd")), "stop-jobs", f"--state-dir={state}", "--grace=2"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=at_most(30))


async def start_sleeping(server: ServerProcess) -> str:
    async with server.client() as client:
        return (await client.start(JobSpec("sleep", ("1000",)))).job_id


async def info_of(server: ServerProcess, job_id: str) -> JobInfo:
    async with server.client() as client:
        return await client.get(job_id).info()


def test_jobs_that_a_server_left_running_are_stopped_and_told_as_shutdown(tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        job_id = anyio.run(start_sleeping, server)
        assert server.end() == 0
        done = stop_jobs(server.state)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with server_process(tmp_path) as server:
        info = anyio.run(info_of, server, job_id)
    assert (info.status, info.end_reason, info.stopped_by) == ("terminated", "shutdown", "jobrunnerd")


def test_it_leaves_the_jobs_of_a_server_that_runs_alone(private_server: ServerProcess) -> None:
    done = stop_jobs(private_server.state)
    assert done.returncode == 3
    assert done.stderr == f"jobrunnerd: cannot use state directory {private_server.state}: another server holds it\n"
