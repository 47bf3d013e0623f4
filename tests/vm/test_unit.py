"""The units of packaging/ under systemd: only in the virtual machine (tests/vm/run.sh), because they change the host's units."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from jobrunner import JobSpec, Limits
from jobrunner.client import ClientJob, JobClient
from jobrunner.output import Chunk
from jobrunner.server.devcerts import make_certs
from tests.support.timing import fail_after

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
UNITS = Path("/etc/systemd/system")
SETTINGS = Path("/etc/jobrunner/jobrunnerd.toml")
CERTS = Path("/etc/jobrunner/certs")
JOBS = Path("/sys/fs/cgroup/system.slice/jobrunner-jobs.service")
TICK = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.2; done"


def systemctl(*words: str) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        told = subprocess.run(["journalctl", "--no-pager", "-n40", "-ujobrunnerd"], capture_output=True, text=True, check=False)
        pytest.fail(f"systemctl {' '.join(words)}: {done.stdout}{done.stderr}\n{told.stdout}")
    return done.stdout.strip()


def show(name: str) -> str:
    return systemctl("show", "--value", f"--property={name}", "jobrunnerd")


def settings(**more: str) -> None:
    lines = [f'{key} = "{CERTS}/{file}"' for key, file in (("ca", "ca.pem"), ("cert", "server.pem"), ("key", "server.key"))]
    SETTINGS.write_text("\n".join([*lines, *(f'{key} = "{value}"' for key, value in more.items())]) + "\n")


@pytest.fixture(scope="module", autouse=True)
def units() -> Iterator[None]:
    if os.environ.get("JOBRUNNER_IN_VM") != "1":
        pytest.fail("this changes the host's units: run it by make test-vm", pytrace=False)
    make_certs(CERTS, {"admin": "admin"})
    for unit in PACKAGING.glob("*.service"):
        shutil.copy(unit, UNITS)
    systemctl("daemon-reload")
    yield
    systemctl("stop", "jobrunnerd", "jobrunner-jobs")


@pytest.fixture
def running() -> None:
    """It runs on from test to test: a start takes long in an emulated machine."""
    settings()
    systemctl("start", "jobrunnerd")


def connected() -> JobClient:
    return JobClient("127.0.0.1:7443", ca=CERTS / "ca.pem", cert=CERTS / "admin.pem", key=CERTS / "admin.key", timeout=120)


async def start_ticking(client: JobClient) -> ClientJob:
    """A job that has written its first line."""
    job = await client.start(JobSpec("sh", ("-c", TICK), limits=Limits(memory=64 << 20, pids=16, cpus=0.5)))
    async with job.log() as reader:
        await anext(reader)
    return job


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


def shim_of(job: ClientJob) -> str:
    (directory,) = JOBS.glob(f"*/jobs/{job.job_id}/shim")
    return (directory / "cgroup.procs").read_text().strip()


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
