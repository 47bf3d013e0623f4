"""What a shim left behind, and what a server finds when it starts.

The rules, for a job whose marker says that it is not settled:

    job.json unreadable                    told in the log and left alone
    job.json, no ctl                       the shim never made itself known: recovery makes ctl itself, and the start never happens
    ctl with a reader                      runs: adopted
    ctl without a reader, exit record ended   settled by the record
    ctl without a reader, no such record   the shim is gone: what is left of the job is killed, and it is `lost`
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from jobrunner.job import Ending, EndReason, Usage
from jobrunner.record import RecordError
from jobrunner.shim.exitrecord import Cause, ExitRecord, State, read_exit

if TYPE_CHECKING:
    from jobrunner.linux.cgroup import JobCgroup
    from jobrunner.record import JobRecord
    from jobrunner.runner import JobRunner, RunnerJob

logger = logging.getLogger(__name__)

REASON_OF = {
    Cause.STOPPED: EndReason.STOPPED,
    Cause.DEADLINE: EndReason.DEADLINE,
    Cause.IDLE_TIMEOUT: EndReason.IDLE_TIMEOUT,
    Cause.OUTPUT_LIMIT: EndReason.OUTPUT_LIMIT,
    Cause.SHUTDOWN: EndReason.SHUTDOWN,
    Cause.OOM_KILLED: EndReason.OOM_KILLED,
    Cause.LOST: EndReason.LOST,
}


def ending_of(exit_record: ExitRecord | None, found: float, stopped_by: str) -> Ending:
    Cause.LOG_ERROR: EndReason.LOG_ERROR,
    """How a job ended, by the record its shim left; `found` (seconds since the epoch) is when a job without one was found dead."""
    if exit_record is None or exit_record.state is not State.ENDED:
        return Ending(EndReason.LOST, found)
    status = exit_record.wait_status
    exit_code = os.WEXITSTATUS(status) if status >= 0 and os.WIFEXITED(status) else None
    signal = os.WTERMSIG(status) if status >= 0 and os.WIFSIGNALED(status) else None
    own = EndReason.SIGNALED if signal is not None else EndReason.EXITED
    reason = REASON_OF.get(exit_record.cause, own)
    by = stopped_by if reason in (EndReason.STOPPED, EndReason.SHUTDOWN) else ""
    return Ending(reason, exit_record.ended_ns / 1e9, exit_code, signal, by, usage_of(exit_record), exit_record.log_end)


def usage_of(exit_record: ExitRecord) -> Usage:
    """The counters of an exit record, read from the cgroup for the last time when it was empty."""
    return Usage(
        cpu_user=_seconds(exit_record.cpu_user_ns),
        cpu_system=_seconds(exit_record.cpu_system_ns),
        memory_peak=exit_record.memory_peak,
        pids_peak=exit_record.pids_peak,
        read_bytes=exit_record.read_bytes,
        write_bytes=exit_record.write_bytes,
        read_ops=exit_record.read_ops,
        write_ops=exit_record.write_ops,
        throttled=_seconds(exit_record.throttled_ns),
        oom_kills=exit_record.oom_kills,
        wall=exit_record.wall_ns / 1e9,
    )


def _seconds(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e9


async def settle(runner: JobRunner, job: RunnerJob) -> None:
    """The shim of a job is gone: see that nothing of the job is left, decide how it ended, and let everyone know."""
    directory = runner.state.directory(job.job_id)
    exit_record, found, by = await anyio.to_thread.run_sync(_read_end, runner, directory, job.job_id)
    if job.cgroup is not None:
        if exit_record is None or exit_record.state is not State.ENDED:
            job.cgroup.kill()  # init has died with the shim; this takes what has not yet
        if not await job.cgroup.removed():
            logger.error("cannot remove cgroup of job %s: it is still busy", job.job_id)
    await anyio.to_thread.run_sync(runner.state.settle, job.job_id)
    job.mark_ended(ending_of(exit_record, found, by))


def _read_end(runner: JobRunner, directory: Path, job_id: str) -> tuple[ExitRecord | None, float, str]:
    path = directory / "exit"
    stop = runner.state.read_stop(job_id)
    found = path.stat().st_mtime if path.exists() else directory.stat().st_mtime
    return read_exit(path), found, stop.by if stop else ""


async def recover(runner: JobRunner) -> None:
    """Take over what is in the state directory and in the cgroup tree: the running jobs first, then the ended ones."""
    state = runner.state
    running = await anyio.to_thread.run_sync(state.running_ids)
    found = await anyio.to_thread.run_sync(state.job_ids)
    for job_id in sorted(found, key=lambda name: name not in running):
        try:
            record = await anyio.to_thread.run_sync(state.load, job_id)
        except RecordError as exc:
            logger.warning("%s; left alone", exc.message)
            continue
        await _take(runner, record, job_id in running)
    for job_id in running - set(found):
        await anyio.to_thread.run_sync(state.settle, job_id)
    known = {job.job_id for job in runner.list()}
    for job_id in runner.cgroups.leftovers():
        if job_id not in known:
            await _sweep(runner.cgroups.reopen(job_id, {}))


async def _take(runner: JobRunner, record: JobRecord, unsettled: bool) -> None:
    directory = runner.state.directory(record.job_id)
    exit_record, found, by = await anyio.to_thread.run_sync(_read_end, runner, directory, record.job_id)
    started = exit_record.started_ns / 1e9 if exit_record else record.created
    if not unsettled:
        runner.remember_request(runner.adopt_settled(record, started, ending_of(exit_record, found, by)))
        return
    cgroup = runner.cgroups.reopen(record.job_id, record.cgroup)
    failed = exit_record is not None and exit_record.state is State.FAILED
    if failed or await anyio.to_thread.run_sync(_claim, directory):
        await _sweep(cgroup)
        await anyio.to_thread.run_sync(runner.state.remove, record.job_id)
        return
    runner.remember_request(runner.adopt(record, cgroup, started))


def _claim(directory: Path) -> bool:
    """Make `ctl`, so that a shim that has not made it yet never starts the job. False if a shim was first."""
    try:
        os.mkfifo(directory / "ctl", 0o600)
    except FileExistsError:
        return False
    return True


async def _sweep(cgroup: JobCgroup) -> None:
    cgroup.kill()
    await cgroup.removed()
