"""Start one job: its item list and the launcher; and the handle on the `ctl` of its shim.

This process is never a job's parent and never in its data path: the launcher leaves once the command has been executed, and what is
left is a FIFO whose only reader is the shim.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from pathlib import Path
from typing import Self

from jobrunner.config import RunnerConfig
from jobrunner.errors import HostError, StartFailed
from jobrunner.job import signal_number
from jobrunner.linux.cgroup import JobCgroup
from jobrunner.record import JobRecord
from jobrunner.shim import binary_path
from jobrunner.shim.launch import LaunchPlan, Report, pack_plan, parse_report

DEFAULT_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/",
    "LANG": "C.UTF-8",
}
LAUNCH_TIMEOUT = 30.0
"""Seconds until a launcher that says nothing is given up: a mount or an exec from a dead network file system."""


def check_host() -> None:
    """HostError, with the remedy, if jobs cannot be started by this process at all."""
    if sys.platform != "linux":
        raise HostError(f"cannot run jobs on {sys.platform}: they need Linux")
    if os.geteuid() != 0:
        raise HostError("cannot run jobs: namespaces and cgroups need root; start the server with sudo")
    binary_path()


def base_name(state_dir: Path) -> str:
    """The name of this state directory's part of the cgroup tree: two servers of one host never share one."""
    return f"jobrunner-{hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:8]}"


async def launch(record: JobRecord, cgroup: JobCgroup, directory: Path, config: RunnerConfig) -> float:
    """Run the launcher until the job's command has been executed. Raises StartFailed with the step that failed."""
    with _item_list(_plan(record, cgroup, directory, config)) as items:
        process = await asyncio.create_subprocess_exec(
            binary_path(), stdin=items, stdout=asyncio.subprocess.PIPE, cwd="/", env={}, start_new_session=True
        )
        assert process.stdout is not None
        line = await process.stdout.read()
        await process.wait()
    report = parse_report(line)
    if not report.started:
        raise StartFailed(record.spec.command, report.step, report.errno, report.detail)
