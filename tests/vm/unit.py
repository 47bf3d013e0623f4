"""What the tests of the units do: systemd, the server that it runs, and its jobs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jobrunner import JobSpec, Limits
from jobrunner.client import ClientJob, JobClient

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


def connected() -> JobClient:
    return JobClient("127.0.0.1:7443", ca=CERTS / "ca.pem", cert=CERTS / "admin.pem", key=CERTS / "admin.key", timeout=120)


async def start_ticking(client: JobClient) -> ClientJob:
    """A job that has written its first line."""
    job = await client.start(JobSpec("sh", ("-c", TICK), limits=Limits(memory=64 << 20, pids=16, cpus=0.5)))
    async with job.log() as reader:
        await anext(reader)
    return job


def shim_of(job: ClientJob) -> str:
    (directory,) = JOBS.glob(f"*/jobs/{job.job_id}/shim")
    return (directory / "cgroup.procs").read_text().strip()
