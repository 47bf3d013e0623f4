"""Launcher, shim and init, killed at the n-th system call of each kind: the start fails or the job ends, at once and told true."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobrunner import JobSpec, StartFailed, launcher
from jobrunner.shim import binary_path
from tests.support.crash import state_of
from tests.support.runner import open_runner
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root", "command:strace")

CASES = [
    ("clone3", 1),  # each of launcher, shim and init makes one process: the launcher is first
    ("mknod,mknodat", 1),  # the shim makes `ctl`
    ("renameat2", 1),
    ("socketpair", 1),
    ("pwrite64", 1),  # the exit record that says `running`
    ("fdatasync", 1),
    ("fsync", 1),
    ("sethostname", 1),  # init
    ("mount", 1),
    ("capset", 1),
    ("sendto", 1),  # GO, and what init tells
    ("signalfd4", 1),
    ("pwrite64", 2),  # the one that says how it ended
    ("fdatasync", 2),
]


@pytest.mark.parametrize(("call", "number"), CASES)
async def test_a_helper_that_is_killed_leaves_nothing_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    helper = tmp_path / "helper"
    what = f"-e trace={call} -e inject={call}:signal=SIGKILL:when={number}"
    helper.write_text(f'#!/bin/sh\nexec /usr/bin/strace -D -f -qq -o /dev/null {what} {binary_path()} "$@"\n')
    helper.chmod(0o755)
    ended: list[str] = []
    async with open_runner(tmp_path) as runner:
        monkeypatch.setattr(launcher, "binary_path", lambda: helper)
        with fail_after(20):
            try:
                job = await runner.start(JobSpec("sh", ("-c", "echo out; exit 3")))
                info = await job.wait()
                ended = [job.job_id]
                assert (str(info.end_reason), info.exit_code) in [("lost", None), ("exited", 3)]
            except StartFailed:
                ended = []
    found = state_of(tmp_path / "state")
    assert found == {name: [] for name in found} | {"records": ended}
