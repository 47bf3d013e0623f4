"""What docs/rootless.md tells the users of a host with systemd, done as it stands there: only in the virtual machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.timing import at_most

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def environ() -> Iterator[dict[str, str]]:
    """A user whose manager runs, as after a login, with the controllers that the page says how to have."""
    if os.environ.get("JOBRUNNER_IN_VM") != "1":
        pytest.fail("this changes the host's users and units: run it by make test-vm", pytrace=False)
    page = (ROOT / "docs/rootless.md").read_text()
    (drop_in,) = re.findall(r"^  ```sh\n(.*?)^  ```$", page, re.DOTALL | re.MULTILINE)
    subprocess.run(["sh", "-euc", drop_in], check=True)
    subprocess.run(["useradd", "--create-home", NAME], check=True)
    uid = subprocess.run(["id", "-u", NAME], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["systemctl", "start", f"user@{uid}"], check=True, timeout=at_most(20))
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH")}
    yield {**kept, "HOME": f"/home/{NAME}", "XDG_RUNTIME_DIR": f"/run/user/{uid}"}
    subprocess.run(["systemctl", "stop", f"user@{uid}"], check=True, timeout=at_most(20))


def delegated(environ: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    scope = ["systemd-run", "--user", "--scope", "--quiet", "-p", "Delegate=yes"]
    as_user = ["setpriv", f"--reuid={NAME}", f"--regid={NAME}", "--init-groups", "--inh-caps=-all", *scope, *command]
    return subprocess.run(as_user, env=environ, capture_output=True, text=True, timeout=at_most(20), check=False)


def test_a_scope_of_the_users_has_all_controllers(environ: dict[str, str]) -> None:
    done = delegated(environ, str(Path(sys.executable).with_name("jobrunnerd")), "check", "--json")
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert (done.returncode, [name for name, finding in found.items() if finding["level"] == "missing"]) == (0, []), done.stderr
    for name in ("cgroup", "cgroup cpu", "cgroup memory", "cgroup pids", "cgroup.kill"):
        assert found[name]["level"] == "ok", found[name]


def test_its_jobs_are_limited_and_taken_over_by_a_server_in_another_scope(environ: dict[str, str]) -> None:
    for part, told in (("first", "oom_killed []\n"), ("next", "stopped 1 []\n")):
        done = delegated(environ, sys.executable, "-c", PROGRAM, part, f"/home/{NAME}/state")
        assert done.stdout == told, done.stderr
