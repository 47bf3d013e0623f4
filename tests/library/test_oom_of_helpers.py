"""The kernel's OOM killer takes a launcher, a shim or an init, as when the host or the server's unit has no memory left.

The victim is put into a cgroup of the test's own, where something takes all memory, and is what the kernel prefers there.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import anyio.to_thread
import pytest

from jobrunner import JobSpec, Limits, StartFailed, launcher
from jobrunner.runner import JobRunner, RunnerJob
from jobrunner.shim import binary_path
from tests.support.crash import state_of
from tests.support.runner import open_runner, processes_with, shell
from tests.support.shim import link_of, own_cgroup, read_proc
from tests.support.timing import at_most, fail_after

pytestmark = pytest.mark.requires("root", "cgroup:memory")

LIMIT = 16 << 20


def limit(cgroup: Path, size: int) -> None:
    v1 = cgroup / "memory.limit_in_bytes"
    (v1 if v1.exists() else cgroup / "memory.max").write_text(str(size))
    for name in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
        if (cgroup / name).exists():
            (cgroup / name).write_text(str(size) if "memsw" in name else "0")


def kills(cgroup: Path) -> int:
    v1 = cgroup / "memory.oom_control"
    words = (v1 if v1.exists() else cgroup / "memory.events").read_text().split()
    return int(words[words.index("oom_kill") + 1])


def helpers_of(runner: JobRunner, job: RunnerJob) -> tuple[int, int]:
    """The pids of its shim and its init."""
    directory = str(runner.state.directory(job.job_id))
    (shim,) = (int(name) for name in os.listdir("/proc") if name.isdigit() and link_of(int(name), "cwd") == directory)
    (init,) = read_proc(shim, f"task/{shim}/children").split()
    return shim, int(init)


def prefer(pid: int) -> None:
    """As what the kernel kills first (proc(5))."""
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def run_out_of_memory(cgroup: Path) -> None:
    """Several take memory there until the kernel has killed each: one alone would have as many points as can be."""
    script = f"echo 0 >{cgroup}/cgroup.procs; for i in 1 2 3 4; do tail /dev/zero & done; wait"
    subprocess.run(["sh", "-c", script], check=False, stderr=subprocess.DEVNULL, timeout=at_most(30))
    assert kills(cgroup) >= 2


@pytest.mark.parametrize("victim", ["shim", "init"])
async def test_a_helper_that_the_kernel_kills_ends_the_job_at_once_and_is_told(tmp_path: Path, victim: str) -> None:
    marker = f"1000.{time.time_ns() % 10**9}"
    with own_cgroup("memory") as cgroup:
        limit(cgroup, LIMIT)
        async with open_runner(tmp_path) as runner:
            job = await runner.start(shell(f"echo out; sleep {marker} & sleep {marker}"))
            async with job.log() as reader:
                assert await reader.next_line()
            pid = helpers_of(runner, job)[victim == "init"]
            prefer(pid)
            (cgroup / "cgroup.procs").write_text(str(pid))
            await anyio.to_thread.run_sync(run_out_of_memory, cgroup)
            with fail_after(10):
                info = await job.wait()
            assert (info.status, info.end_reason, info.exit_code) == ("failed", "lost", None)
            assert processes_with(marker) == []
            await runner.settled()
    found = state_of(tmp_path / "state")
    assert found == {name: [] for name in found} | {"records": [job.job_id]}


async def test_an_init_that_the_kernel_kills_for_its_jobs_memory_is_told_as_that(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(
            shell("echo up; while [ ! -e /work/go ]; do sleep 0.01; done; exec tail /dev/zero", limits=Limits(memory=LIMIT))
        )
        async with job.log() as reader:
            assert await reader.next_line()
        prefer(helpers_of(runner, job)[1])
        (runner.state.directory(job.job_id) / "work" / "go").touch()
        with fail_after(20):
            info = await job.wait()
    assert (info.status, info.end_reason) == ("failed", "oom_killed")


async def test_a_launcher_that_the_kernel_kills_leaves_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_cgroup("memory") as cgroup:
        limit(cgroup, 0)
        helper = tmp_path / "helper"
        helper.write_text(f'#!/bin/sh\necho 0 >{cgroup}/cgroup.procs\nexec {binary_path()} "$@"\n')
        helper.chmod(0o755)
        async with open_runner(tmp_path) as runner:
            monkeypatch.setattr(launcher, "binary_path", lambda: helper)
            with fail_after(20), pytest.raises(StartFailed, match="launcher: it was killed"):
                await runner.start(JobSpec("true"))
            assert kills(cgroup) >= 1
            await runner.settled()
    found = state_of(tmp_path / "state")
    assert found == {name: [] for name in found}
