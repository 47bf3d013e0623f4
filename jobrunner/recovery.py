"""What a shim left behind, and what a server finds when it starts.

The rules, for a job whose marker, or cgroup, says that it is not settled (docs/formats.md has them for all that can be found):

    no job.json, and nothing after it        a crash while it was made: what is left is removed
    job.json damaged, or of a newer version  set aside in `corrupt/`; left alone while a shim of it lives, which is somebody's
    what cannot be read, or done (EIO)       told in the log and left alone
    no ctl                                   no shim made itself known yet: recovery makes ctl itself, and the start never happens
    ctl with a reader                        runs: adopted
    ctl without a reader, exit record ended  settled by the record
    ... start failed, or no exit record      nothing was executed: removed, if there is no output either
    ... exit record running, or damaged      the shim was killed: what is left of the job is killed, and it is `lost`

A stop that was asked for is asked again of a shim that lives. Settled jobs are loaded beside, or when they are asked for; of those
that are still leaving the uid is held at once, until their files are the server's.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread

from jobrunner.handle import RunnerJob
from jobrunner.job import Ending, EndReason, Usage
from jobrunner.record import RecordError
from jobrunner.shim.exitrecord import Cause, ExitRecord, State

if TYPE_CHECKING:
    from jobrunner.linux.cgroup import JobCgroup
    from jobrunner.record import JobRecord
    from jobrunner.runner import JobRunner
    from jobrunner.statedir import Found

logger = logging.getLogger(__name__)

BATCH = 50
"""Ended jobs that are loaded in one go: some milliseconds."""
PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})
"""Errors of this process that say nothing about a job's files: what met one is tried again."""
TRY_AGAIN = 1.0
"""Seconds until then."""

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
    size: int = 0
    """Bytes of its log, and of its work directory where project quotas count them."""

    def ending(self) -> Ending:
        return ending_of(self.exit_record, self.found, self.stopped_by)


def look(runner: JobRunner, job: RunnerJob, settling: bool) -> Left:
    """Read it all. A job that is settled without a record of its end gets the time of now, for good.

    Raises RecordError for an exit record of a newer version.
    """
    path = runner.state.directory(job.job_id) / "exit"
    exit_record = runner.state.exit_record(job.job_id)
    ended = exit_record is not None and exit_record.state is State.ENDED
    there = os.path.lexists(path)
    if settling and not ended and there:
        os.utime(path, follow_symlinks=False)
    failed = exit_record is not None and exit_record.state is State.FAILED
    stop = runner.state.read_stop(job.job_id)
    return Left(
        exit_record,
        ran=runner.state.has_run(job.job_id) and not failed,
        found=path.lstat().st_mtime if there else job.record.created,
        stopped_by=stop.by if stop else job.stop_asked_by or "",
        bounds=_bounds(job),
        size=runner.state.kept_bytes(job.job_id),
    )


def _bounds(job: RunnerJob) -> tuple[int, int]:
    """Of its log; a log that cannot be read is no reason to lose the record. Who reads it is told."""
    try:
        return job.read_bounds()
    except OSError as exc:
        if exc.errno in PASSING:
            raise
        logger.error("cannot read log of job %s: %s", job.job_id, exc)
        return (0, 0)


async def settle(runner: JobRunner, job: RunnerJob) -> None:
    """The shim of a job is gone: see that nothing of the job is left, decide how it ended, and let everyone know."""
    left, settled = await _at_once(runner, job)
    cleared = True
    if settled is None:
        cleared = await _clear(job, left.exit_record)
        settled = await anyio.to_thread.run_sync(_mark, runner, job.job_id, left.ran)
    if not left.ran:
        runner.forget(job)
    runner.end(job, left)
    if not cleared:
        logger.error("cannot remove cgroup of job %s: it is still busy; its uid stays taken", job.job_id)
    elif settled:
        runner.identities.give_back(job.record.uid)
    elif left.ran:
        await _give_back(runner, job.job_id, job.record.uid)


async def _at_once(runner: JobRunner, job: RunnerJob) -> tuple[Left, bool | None]:
    while True:
        try:
            return await anyio.to_thread.run_sync(_settle_now, runner, job)
        except (OSError, RecordError) as exc:
            logger.error("cannot read how job %s ended: %s", job.job_id, exc)
            if not isinstance(exc, OSError) or exc.errno not in PASSING:
                return Left(None, True, time.time(), job.stop_asked_by or "", (0, 0)), None
        await asyncio.sleep(TRY_AGAIN)


def _settle_now(runner: JobRunner, job: RunnerJob) -> tuple[Left, bool | None]:
    """What is left, and what `_mark` says: None if the cgroup is not empty yet, or is not to be trusted to be."""
    left = look(runner, job, True)
    ended = left.exit_record is not None and left.exit_record.state is State.ENDED
    if not ended or (job.cgroup is not None and not job.cgroup.remove()):
        return left, None
    return left, _mark(runner, job.job_id, left.ran)


def _mark(runner: JobRunner, job_id: str, ran: bool) -> bool:
    """From here on it is settled for a later server too; True if its uid is free as well. One that never ran is removed: it has its
    uid while anything is left of it.
    """
    try:
        if ran:
            return runner.state.settle(job_id)
        runner.state.remove(job_id)
        return not os.path.lexists(runner.state.removed / job_id)
    except OSError as exc:  # it has its marker still, so the next server does it
        logger.error("cannot settle job %s: %s", job_id, exc)
    return False


async def _give_back(runner: JobRunner, job_id: str, uid: int) -> None:
    """The job's uid is free once nothing is left that belongs to it. Not before the end is told: there may be much of it."""
    try:
        await anyio.to_thread.run_sync(runner.state.reown, job_id, limiter=runner.walks)
    except OSError as exc:
        logger.error("cannot take over the work directory of job %s: %s; its uid stays taken", job_id, exc)
        return
    runner.identities.give_back(uid)


async def _clear(job: RunnerJob, exit_record: ExitRecord | None) -> bool:
    """False if something of the job may be alive still: not even SIGKILL ends a process that waits for a disk."""
    if job.cgroup is None:
        return True
    if exit_record is None or exit_record.state is not State.ENDED:
        job.cgroup.kill()  # init has died with the shim; this takes what has not yet
    return await job.cgroup.removed()


async def recover(runner: JobRunner) -> Found:
    """Take over the jobs that may run, and clear what has no job. What is left to do: `load_rest` and `tidy`."""
    found = await anyio.to_thread.run_sync(runner.state.find)
    await anyio.to_thread.run_sync(_load_requests, runner)
    for uid in (*found.leaving.values(), *found.removed.values()):
        runner.identities.hold(uid)
    cgroups = set(runner.cgroups.leftovers())
    unsettled = [*found.unsettled, *cgroups.intersection(found.settled)]  # a marker that was lost is no reason to lose a job
    ours = set(found.settled) | set(found.unsettled)
    for job_id in unsettled:
        if not await _take(runner, job_id):
            ours.discard(job_id)
    for job_id in cgroups - ours:
        await _sweep(runner.cgroups.reopen(job_id, {}))
    settled = [job_id for job_id in found.settled if job_id not in cgroups]
    leaving = {job_id: uid for job_id, uid in found.leaving.items() if job_id not in cgroups}
    return replace(found, settled=settled, leaving=leaving)


def _load_requests(runner: JobRunner) -> None:
    """Without them a server serves all the same: what is asked for again after its job was removed may happen twice then."""
    requests = runner.catalog.requests
    try:
        requests.load()
    except RecordError as exc:
        runner.state.set_aside(requests.path, exc.message)
    except OSError as exc:
        logger.error("cannot read %s: %s; the request ids of removed jobs are not known", requests.path, exc.strerror)


async def tidy(runner: JobRunner, found: Found) -> None:
    """What servers before this one were at: removals, and work directories on their way to root."""
    for name, uid in found.removed.items():
        if await anyio.to_thread.run_sync(runner.state.remove_for_good, name, limiter=runner.walks):
            runner.identities.give_back(uid)
    for job_id, uid in found.leaving.items():
        await _give_back(runner, job_id, uid)


async def _take(runner: JobRunner, job_id: str) -> bool:
    """False if there is no such job, and nothing may run of it."""
    try:
        return await _take_over(runner, job_id)
    except OSError as exc:
        logger.error("cannot take over job %s: %s; left alone", job_id, exc)
        runner.identities.hold(runner.state.owner(runner.state.directory(job_id)))
        return True


async def _take_over(runner: JobRunner, job_id: str) -> bool:
    state = runner.state
    try:
        record, never, exit_record = await anyio.to_thread.run_sync(_read_unsettled, runner, job_id)
    except FileNotFoundError:  # a crash while it was made
        return not await _remove(runner, runner.cgroups.reopen(job_id, {}), job_id, state.owner(state.directory(job_id)))
    except RecordError as exc:
        return not await anyio.to_thread.run_sync(_give_up, runner, job_id, exc)
    cgroup = runner.cgroups.reopen(job_id, record.cgroup)
    if never:
        return not await _remove(runner, cgroup, job_id, record.uid)
    stop = state.read_stop(job_id)
    asked = None if stop is None and not state.stop_was_asked(job_id) else stop.by if stop else ""
    runner.identities.hold(record.uid)
    runner.adopt(record, cgroup, exit_record.started_ns / 1e9 if exit_record else record.created, asked)
    return True


def _read_unsettled(runner: JobRunner, job_id: str) -> tuple[JobRecord, bool, ExitRecord | None]:
    """Its record, whether it never ran and never will, and its exit record."""
    record = runner.state.load(job_id)
    if runner.state.claim(job_id):
        return record, True, None
    # Order: first whether a shim lives; one that does not writes nothing more.
    alive = runner.state.shim_lives(job_id)
    exit_record = runner.state.exit_record(job_id)
    failed = exit_record is not None and exit_record.state is State.FAILED
    never = failed or not runner.state.has_run(job_id)
    return record, never and not alive, exit_record


def _give_up(runner: JobRunner, job_id: str, why: RecordError) -> bool:
    """Set a job aside that cannot be understood; False if it may still run, and is left alone."""
    directory = runner.state.directory(job_id)
    if runner.state.shim_lives(job_id):
        logger.error("cannot use %s: %s; left alone, for it runs", directory, why.message)
        runner.identities.hold(runner.state.owner(directory))
        return False
    runner.state.set_aside(directory, why.message)
    runner.state.unmark(job_id)
    return True


def load_one(runner: JobRunner, job_id: str) -> tuple[RunnerJob, Left] | None:
    """A settled job, from disk; None if it turned out to be none. Raises OSError if it cannot be read now. For a thread."""
    try:
        record = runner.state.load(job_id)
        exit_record = runner.state.exit_record(job_id)
        job = RunnerJob(record, runner, None, exit_record.started_ns / 1e9 if exit_record else record.created)
        return job, look(runner, job, False)
    except FileNotFoundError:  # a crash while it was made
        runner.state.remove(job_id)
    except RecordError as exc:
        _give_up(runner, job_id, exc)
    return None


async def load_rest(runner: JobRunner, job_ids: list[str]) -> None:
    """The settled jobs, batch by batch; what cannot be read now is told, and tried again when it is asked for."""
    for begin in range(0, len(job_ids), BATCH):
        for job, left in await anyio.to_thread.run_sync(_load_batch, runner, job_ids[begin : begin + BATCH]):
            runner.catalog.take_ended(job, left)
        await anyio.lowlevel.checkpoint()


def _load_batch(runner: JobRunner, job_ids: list[str]) -> list[tuple[RunnerJob, Left]]:
    found = []
    for job_id in job_ids:
        try:
            if runner.catalog.is_unloaded(job_id) and (one := load_one(runner, job_id)) is not None:
                found.append(one)
        except OSError as exc:
            logger.error("cannot read job %s: %s; left alone", job_id, exc)
    return found


async def _remove(runner: JobRunner, cgroup: JobCgroup, job_id: str, uid: int) -> bool:
    """Remove a job that never ran, and never will; False if that is left to the next server.

    A launcher of a server before this one may still be at it: while the cgroup is busy, the `ctl` that keeps it from the start
    stays.
    """
    if not await _sweep(cgroup):
        logger.error("cannot remove job %s, which never ran: its cgroup is busy", job_id)
        runner.identities.hold(uid)
        return False
    await anyio.to_thread.run_sync(runner.state.remove, job_id)
    return True


async def _sweep(cgroup: JobCgroup) -> bool:
    cgroup.kill()
    return await cgroup.removed()
