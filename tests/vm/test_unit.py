"""The units of packaging/ under systemd: only in the virtual machine."""

from __future__ import annotations

import os
import signal

import anyio
import pytest

from jobrunner import JobSpec, Limits
from jobrunner.client import ClientJob
from jobrunner.output import Chunk
from tests.support.timing import fail_after
from tests.vm.unit import JOBS, connected, settings, shim_of, show, start_ticking, systemctl


async def main_pid_other_than(pid: str) -> str:
    """Wait for the next server; systemd has no event that a client could wait for by `systemctl` alone."""
    with fail_after(12):
        while show("MainPID") in ("0", pid) or show("ActiveState") != "active":  # noqa: ASYNC110  # another process's state
            await anyio.sleep(0.5)
    return show("MainPID")


async def lines_so_far(job: ClientJob) -> list[int]:
    async with job.log(follow=False) as reader:
        data = b"".join([part.data async for part in reader if isinstance(part, Chunk)])
    return [int(line) for line in data.splitlines()]


@pytest.mark.usefixtures("running")
async def test_systemd_knows_when_the_server_is_ready() -> None:
    assert (show("ActiveState"), show("StatusText")) == ("active", "listening on 127.0.0.1:7443")
    assert show("WatchdogUSec") == "30s"


@pytest.mark.usefixtures("running")
async def test_limits_hold_under_the_unit() -> None:
    async with connected() as client:
        job = await client.start(JobSpec("tail", ("/dev/zero",), limits=Limits(memory=48 << 20, read_bps=1 << 30)))
        info = await job.wait()
        assert (info.end_reason, info.missing) == ("oom_killed", ())
        ticking = await start_ticking(client)
        (directory,) = JOBS.glob(f"*/jobs/{ticking.job_id}")
        assert (directory / "cpu.max").read_text() == "50000 100000\n"
        assert (directory / "job" / "pids.max").read_text() == "16\n"
        assert (await ticking.stop(grace=1)).end_reason == "stopped"


@pytest.mark.usefixtures("running")
async def test_jobs_run_on_over_a_restart_and_can_be_read_and_stopped_after_it() -> None:
    async with connected() as client:
        job = await start_ticking(client)
    shim, server = shim_of(job), show("MainPID")
    systemctl("restart", "jobrunnerd")
    assert show("MainPID") != server
    assert shim_of(job) == shim
    async with connected() as client:
        again = client.get(job.job_id)
        assert await again.status() == "running"
        numbers = await lines_so_far(again)
        assert numbers == list(range(len(numbers)))
        assert (await again.stop(grace=1)).end_reason == "stopped"
    assert list(JOBS.glob(f"*/jobs/{job.job_id}")) == []


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("how", ["killed", "hangs"])
async def test_a_server_that_dies_is_started_again_and_its_jobs_run_on(how: str) -> None:
    async with connected() as client:
        job = await start_ticking(client)
    shim, server = shim_of(job), show("MainPID")
    os.kill(int(server), signal.SIGKILL if how == "killed" else signal.SIGSTOP)  # the watchdog finds the second
    await main_pid_other_than(server)
    assert shim_of(job) == shim
    async with connected() as client:
        assert (await client.get(job.job_id).stop(grace=1)).end_reason == "stopped"


@pytest.mark.usefixtures("running")
async def test_stop_leaves_jobs_running_by_default() -> None:
    async with connected() as client:
        job = await start_ticking(client)
    shim = shim_of(job)
    systemctl("stop", "jobrunnerd")
    assert (show("ActiveState"), show("Result"), shim_of(job)) == ("inactive", "success", shim)
    systemctl("start", "jobrunnerd")
    async with connected() as client:
        assert (await client.get(job.job_id).stop(grace=1)).end_reason == "stopped"


@pytest.mark.usefixtures("running")
async def test_stop_ends_jobs_where_the_settings_say_so() -> None:
    settings(on_shutdown="stop")
    systemctl("restart", "jobrunnerd")
    async with connected() as client:
        job = await start_ticking(client)
    systemctl("stop", "jobrunnerd")
    assert show("Result") == "success"
    assert list(JOBS.glob(f"*/jobs/{job.job_id}")) == []
    settings()
    systemctl("start", "jobrunnerd")
    async with connected() as client:
        info = await client.get(job.job_id).info()
    assert (info.status, info.end_reason) == ("terminated", "shutdown")


@pytest.mark.usefixtures("running")
async def test_the_jobs_unit_ends_all_jobs() -> None:
    async with connected() as client:
        job = await start_ticking(client)
    systemctl("stop", "jobrunner-jobs")  # takes the server with it, which requires it
    assert not JOBS.exists()
    systemctl("start", "jobrunnerd")
    async with connected() as client:
        info = await client.get(job.job_id).info()
        assert (info.status, info.end_reason) == ("terminated", "shutdown")
