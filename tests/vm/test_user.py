"""A server of an ordinary user as a service of systemd's, with cgroups that this delegates: only in the virtual machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.timing import at_most

NAME = "jobrunner-user"
PROGRAM = """
import asyncio, sys
from pathlib import Path
from jobrunner import JobSpec, Limits
from jobrunner.config import RunnerConfig
from jobrunner.runner import JobRunner

LIMITS = Limits(memory=32 << 20, cpus=0.5, pids=8)

async def first(runner):
    hungry = await runner.start(JobSpec("sh", ("-c", "tail /dev/zero"), limits=LIMITS))
    info = await hungry.wait()
    print(info.end_reason, [text for text in info.missing if ": not limited: " in text])
    await runner.start(JobSpec("sleep", ("600",), limits=LIMITS))

async def next(runner):
    (job,) = [job for job in await runner.list() if not job.ended]
    before = [path for path in job.cgroup.paths.values() if Path(path).exists()]
    info = await job.stop(grace=0)
    print(info.end_reason, len(before), [path for path in before if Path(path).exists()])

async def main():
    async with JobRunner.open(RunnerConfig(state_dir=Path(sys.argv[2]))) as runner:
        await globals()[sys.argv[1]](runner)

asyncio.run(main())
"""


@pytest.fixture(scope="module", autouse=True)
def user() -> None:
    if os.environ.get("JOBRUNNER_IN_VM") != "1":
        pytest.fail("this changes the host's users: run it by make test-vm", pytrace=False)
    subprocess.run(["useradd", "--create-home", NAME], check=True)


def delegated(*command: str) -> subprocess.CompletedProcess[str]:
    """In a service of its own, whose cgroup is the user's; what it leaves running is left alone."""
    service = [f"User={NAME}", "Delegate=yes", "KillMode=process"]
    words = [f"--property={setting}" for setting in service]
    words += [f"--setenv={name}={os.environ[name]}" for name in ("PATH", "PYTHONPATH")]
    run = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", *words, *command]
    return subprocess.run(run, capture_output=True, text=True, timeout=at_most(30), check=False)


def test_a_service_of_the_users_has_all_controllers() -> None:
    done = delegated(str(Path(sys.executable).with_name("jobrunnerd")), "check", "--json")
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert (done.returncode, [name for name, finding in found.items() if finding["level"] == "missing"]) == (0, []), done.stderr
    for name in ("cgroup", "cgroup cpu", "cgroup memory", "cgroup pids", "cgroup.kill"):
        assert found[name]["level"] == "ok", found[name]


def test_its_jobs_are_limited_and_taken_over_by_a_server_in_another_service() -> None:
    for part, told in (("first", "oom_killed []\n"), ("next", "stopped 1 []\n")):
        done = delegated(sys.executable, "-c", PROGRAM, part, f"/home/{NAME}/state")
        assert done.stdout == told, done.stderr
