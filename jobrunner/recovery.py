"""What a shim left behind, and what a server finds when it starts.

The rules, for a job whose marker says that it is not settled:

    no job.json                              a crash while it was made or removed: what is left is removed
    job.json unreadable                      told in the log and left alone, with whatever may run of it
    no ctl                                   no shim made itself known yet: recovery makes ctl itself, and the start never happens
    ctl with a reader                        runs: adopted
    ctl without a reader, exit record ended  settled by the record
    ... start failed, or no exit record      nothing was executed: removed
    ... exit record running, or damaged      the shim was killed: what is left of the job is killed, and it is `lost`
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio.to_thread

from jobrunner.job import Ending, EndReason, Usage
from jobrunner.record import RecordError
from jobrunner.shim.exitrecord import Cause, ExitRecord, State, read_exit

if TYPE_CHECKING:
    from jobrunner.handle import RunnerJob
    from jobrunner.linux.cgroup import JobCgroup
    from jobrunner.record import JobRecord
    from jobrunner.runner import JobRunner

logger = logging.getLogger(__name__)

REASON_OF = {
    Cause.STOPPED: EndReason.STOPPED,
    Cause.DEADLINE: EndReason.DEADLINE,
    Cause.IDLE_TIMEOUT: EndReason.IDLE_TIMEOUT,
    Cause.OUTPUT_LIMIT: EndReason.OUTPUT_LIMIT,
    Cause.SHUTDOWN: EndReason.SHUTDOWN,
    Cause.OOM_KILLED: EndReason.OOM_KILLED,
    Cause.LOST: EndReason.LOST,
    Cause.LOG_ERROR: EndReason.LOG_ERROR,
}


def ending_of(exit_record: ExitRecord | None, found: float, stopped_by: str) -> Ending:
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


@dataclass(frozen=True, slots=True)
class Left:
    """What is on disk of a job whose shim is gone."""

    exit_record: ExitRecord | None
    ran: bool
    """False if its start failed, or never came to executing anything: an `exit` is there before the command is let go."""
    found: float
    """When it was found dead, if no record tells when it ended; seconds since the epoch."""
    stopped_by: str
    bounds: tuple[int, int]

    def ending(self) -> Ending:
        return ending_of(self.exit_record, self.found, self.stopped_by)


def look(runner: JobRunner, job: RunnerJob, settling: bool) -> Left:
    """Read it all. A job that is settled without a record of its end gets the time of now, for good."""
    path = runner.state.directory(job.job_id) / "exit"
    exit_record = read_exit(path)
    ended = exit_record is not None and exit_record.state is State.ENDED
    if settling and not ended and path.exists():
        os.utime(path)
    failed = exit_record is not None and exit_record.state is State.FAILED
    stop = runner.state.read_stop(job.job_id)
    return Left(
        exit_record,
        ran=path.exists() and not failed,
        found=path.stat().st_mtime if path.exists() else job.record.created,
        stopped_by=stop.by if stop else job.stop_asked_by or "",
        bounds=job.read_bounds(),
    )


async def settle(runner: JobRunner, job: RunnerJob) -> None:
    """The shim of a job is gone: see that nothing of the job is left, decide how it ended, and let everyone know."""
    left = Left(None, True, time.time(), job.stop_asked_by or "", (0, 0))
    try:
        left = await anyio.to_thread.run_sync(look, runner, job, True)
        await _clear(job, left.exit_record)
        work = runner.state.settle if left.ran else runner.state.remove
        await anyio.to_thread.run_sync(work, job.job_id)
    except OSError as exc:
        # Told as what is known now; recovery does after a restart what could not be done.
        logger.error("cannot settle job %s: %s", job.job_id, exc)
    if not left.ran:
        runner.forget(job)
    runner.end(job, left.ending(), left.bounds)


async def _clear(job: RunnerJob, exit_record: ExitRecord | None) -> None:
    if job.cgroup is None:
        return
    if exit_record is None or exit_record.state is not State.ENDED:
        job.cgroup.kill()  # init has died with the shim; this takes what has not yet
    if not await job.cgroup.removed():
        logger.error("cannot remove cgroup of job %s: it is still busy", job.job_id)


async def recover(runner: JobRunner) -> None:
    """Take over what is in the state directory and in the cgroup tree: the running jobs first, then the ended ones."""
    state = runner.state
    running = await anyio.to_thread.run_sync(state.running_ids)
    found = await anyio.to_thread.run_sync(state.job_ids)
    for job_id in sorted(found, key=lambda name: name not in running):
        try:
            record = await anyio.to_thread.run_sync(state.load, job_id)
        except FileNotFoundError:  # a crash while it was made, or removed
            await _remove(runner, runner.cgroups.reopen(job_id, {}), job_id)
        except RecordError as exc:
            logger.warning("%s; left alone", exc.message)
        else:
            await _take(runner, record, job_id in running)
    for job_id in running - set(found):
        await anyio.to_thread.run_sync(state.settle, job_id)
    # Those that were left alone may run: they are somebody's, if not ours.
    for job_id in set(runner.cgroups.leftovers()) - set(found):
        await _sweep(runner.cgroups.reopen(job_id, {}))


async def _take(runner: JobRunner, record: JobRecord, unsettled: bool) -> None:
    exit_record = await anyio.to_thread.run_sync(read_exit, runner.state.directory(record.job_id) / "exit")
    started = exit_record.started_ns / 1e9 if exit_record else record.created
    if not unsettled:
        job = runner.adopt_settled(record, started)
        left = await anyio.to_thread.run_sync(look, runner, job, False)
        runner.end(job, left.ending(), left.bounds)
    elif await anyio.to_thread.run_sync(runner.state.claim, record.job_id):
        await _remove(runner, runner.cgroups.reopen(record.job_id, record.cgroup), record.job_id)
        return
    else:
        job = runner.adopt(record, runner.cgroups.reopen(record.job_id, record.cgroup), started)
    runner.remember_request(job)


async def _remove(runner: JobRunner, cgroup: JobCgroup, job_id: str) -> None:
    await _sweep(cgroup)
    await anyio.to_thread.run_sync(runner.state.remove, job_id)


async def _sweep(cgroup: JobCgroup) -> None:
    cgroup.kill()
    await cgroup.removed()
