"""The server of an ordinary user: tests/rootless, run as a real one, with cgroups that are delegated to him and without."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import pytest

from jobrunner.job import is_job_id
from tests.support.shim import wait_until
from tests.support.timing import at_most
from tests.support.user import NONE, ROOT, Delegation, command_as_user, delegated, home, processes_of_user

pytestmark = [pytest.mark.requires("root", "command:unshare", "command:setpriv"), pytest.mark.timeout(120)]


JOBS, ATTACKS, SERVICE, UIDS = (f"tests/rootless/test_{name}.py" for name in ("jobs", "attacks", "service", "uids"))
FORKS = f"{ATTACKS}::test_a_fork_bomb_meets_its_limit_exactly"
LIMITS = f"{ATTACKS}::test_its_limits_are_its_users_files_and_cannot_be_written_to"
TESTS = {
    "cgroups": ["tests/rootless"],
    "memory and pids": ["tests/rootless/test_partly.py"],
    "nothing": [JOBS, SERVICE, FORKS],
    "ids": [UIDS, JOBS, FORKS],
}
if os.environ.get("JOBRUNNER_IN_VM") == "1":  # what is of cgroup v2 alone
    TESTS = {"cgroups": [JOBS, FORKS, LIMITS], "memory and pids": TESTS["memory and pids"]}
CGROUPS: Mapping[str, Callable[[], AbstractContextManager[Delegation]]] = {
    "cgroups": delegated,
    "memory and pids": partial(delegated, ("memory", "pids")),  # what systemd gives users at least
    "nothing": lambda: contextlib.nullcontext(NONE),
    "ids": delegated,
}


NEEDS = {"ids": [pytest.mark.requires("command:newuidmap", "command:newgidmap")]}


@pytest.mark.parametrize("given", [pytest.param(given, marks=NEEDS.get(given, [])) for given in TESTS])
def test_everything_works_for_a_real_user(given: str) -> None:
    with home() as directory, CGROUPS[given]() as delegation:
        environ = {"HOME": str(directory), "TMPDIR": str(directory), "JOBRUNNER_TEST_USER": given}
        environ |= {name: os.environ[name] for name in ("JOBRUNNER_MUST_RUN", "JOBRUNNER_TIME_FACTOR") if name in os.environ}
        environ |= {"JOBRUNNERD_CGROUP_PARENT": delegation.parent, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={directory}/pytest"]
        pytest_command += [f"--timeout={at_most(60):.0f}", "--durations=5", *TESTS[given]]
        done = subprocess.run(
            command_as_user(pytest_command, delegation, environ, ids=given == "ids"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=at_most(110),
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout)
        wait_until(lambda: processes_of_user() == [])
        # On v2 the leaf stays that a server has moved into.
        assert [path for place in delegation.directories for path in place.rglob("*") if is_job_id(path.name)] == []
