"""A disk that stalls: a uid is not another job's while a process that nothing ends may have it, and no stop waits for the disk."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from jobrunner import JobSpec
from jobrunner.errors import LimitReached
from jobrunner.runner import JobRunner
from tests.support.runner import open_runner, run, shims_below
from tests.support.shim import read_proc
from tests.support.stall import stalled
from tests.support.timing import fail_after

pytestmark = [pytest.mark.requires("root", "command:mkfs.ext4", "command:fsfreeze"), pytest.mark.timeout(90)]

ONE = (1_879_048_192, 2)
"""Uids of jobs: the first is that of files of workspaces, so there is one."""


async def refused(runner: JobRunner) -> None:
    with pytest.raises(LimitReached, match="all 1 uids are of running jobs"):
        await runner.start(JobSpec("true"))


async def test_a_never_run_job_whose_cgroup_is_busy_keeps_its_uid(tmp_path: Path, own_disk: Path) -> None:
    async with open_runner(tmp_path, job_uids=ONE) as runner:
        job = await runner.start(JobSpec("true"))
        await job.wait()
        await runner.settled()
        directory = runner.state.directory(job.job_id)
    for path in (directory / "ctl", directory / "exit", *(directory / "log").iterdir()):
        path.unlink()  # as a crash between the durable record and the launcher leaves it
    (tmp_path / "state" / "running" / job.job_id).touch()
    with stalled(own_disk):
        stuck = await anyio.to_thread.run_sync(enter_and_wait, job.record.cgroup, own_disk)
        async with open_runner(tmp_path, job_uids=ONE) as runner:
            assert await runner.list() == []
            await refused(runner)
        assert directory.exists(), "the `ctl` that keeps a launcher from the start stays"
    await anyio.to_thread.run_sync(stuck.wait)
    async with open_runner(tmp_path, job_uids=ONE) as runner:
        assert not directory.exists()
        assert (await run(runner, JobSpec("true"))).exit_code == 0


def enter_and_wait(cgroups: Mapping[str, str], disk: Path) -> subprocess.Popen[bytes]:
    """A process in these cgroups that is stuck in a write."""
    places = [Path(path, "job") if Path(path, "job").exists() else Path(path) for path in cgroups.values()]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    entered = "; ".join(f"echo $$ >{place}/cgroup.procs" for place in places)
    process = subprocess.Popen(["/bin/sh", "-c", f"{entered}; exec dd if=/dev/zero of={disk}/file count=1 status=none"])
    while not (status := read_proc(process.pid, "status")).startswith(b"Name:\tdd\n") or b"\nState:\tD" not in status:
        assert process.poll() is None
    return process


async def test_a_job_of_which_a_process_cannot_die_keeps_its_uid_until_it_has(tmp_path: Path, own_disk: Path) -> None:
    async with open_runner(tmp_path, job_uids=ONE) as runner:
        job = await runner.start(JobSpec("sleep", ("100",)))
        with stalled(own_disk):
            stuck = await anyio.to_thread.run_sync(enter_and_wait, job.record.cgroup, own_disk)
            for pid in shims_below(runner.state.directory(job.job_id)):
                os.kill(pid, signal.SIGKILL)
            with fail_after(20):
                assert (await job.wait()).end_reason == "lost"
                await runner.settled()
            await refused(runner)
        await anyio.to_thread.run_sync(stuck.wait)
    async with open_runner(tmp_path, job_uids=ONE) as runner:
        with fail_after(20):
            assert (await (await runner.get(job.job_id)).wait()).end_reason == "lost"
            await runner.settled()
        assert (await run(runner, JobSpec("true"))).exit_code == 0


async def test_a_stop_of_a_job_whose_records_are_on_a_disk_that_stalls_ends_it(own_disk: Path) -> None:
    async with open_runner(own_disk) as runner:
        job = await runner.start(JobSpec("sleep", ("100",), grace=0))
        (shim,) = shims_below(runner.state.directory(job.job_id))
        init = os.pidfd_open(int(read_proc(shim, f"task/{shim}/children")))
        with stalled(own_disk):
            asking = asyncio.ensure_future(job.stop(grace=0, by="alice"))
            with fail_after(20):
                await anyio.wait_readable(init)
        os.close(init)
        with fail_after(20):
            await asyncio.wait([asking])
            info = await job.wait()
    assert (info.end_reason, info.stopped_by) == ("stopped", "alice")
