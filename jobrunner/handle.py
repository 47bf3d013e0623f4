"""The handle on one job of this host, that `JobRunner.start` and `JobRunner.get` give: its state, its end, its log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

import anyio.to_thread

from jobrunner.errors import HostError, InvalidRequest, StopFailed
from jobrunner.job import Ending, Job, JobInfo, JobStatus, Stream, Usage, signal_number
from jobrunner.log import Log, LogReader
from jobrunner.output import Selection
from jobrunner.shim.stopfile import StopRequest
from jobrunner.spec import MAX_GRACE

if TYPE_CHECKING:
    from jobrunner.linux.cgroup import JobCgroup
    from jobrunner.record import JobRecord
    from jobrunner.runner import JobRunner
    from jobrunner.sandbox import ShimHandle

__all__ = ["RunnerJob"]

logger = logging.getLogger(__name__)
DURABLE_WITHIN = 2.0
"""Seconds that the disk has to take a stop before it is carried out all the same."""
GONE_AFTER_KILL = 5.0
"""Seconds that a killed tree may take to go away before a stop is told as failed."""


class RunnerJob:
    """A job of this host. Its runner makes it, and calls `mark_ended` once."""

    def __init__(self, record: JobRecord, runner: JobRunner, cgroup: JobCgroup | None, started: float) -> None:
        self.job_id = record.job_id
        self.record = record
        self.cgroup = cgroup
        self.shim: ShimHandle | None = None
        """None once the shim is known to be gone, and for the moment in which it could not be reached."""
        self.stop_asked_by: str | None = None
        self._job = Job(
            record.job_id,
            record.spec,
            record.limits,
            record.user,
            record.node,
            record.created,
            started,
            record.missing,
            record.work,
        )
        self._runner = runner
        self._ended = asyncio.Event()
        self._stopping = asyncio.Lock()
        self._log = Log(self, runner.state.directory(self.job_id) / "log", runner.chunks, runner.inotify.changed)
        self._final_bounds: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return f"<RunnerJob {self.job_id} {self.status} {self.record.spec.command!r}>"

    @property
    def status(self) -> JobStatus:
        """running, completed, failed or terminated."""
        return self._job.status

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def is_read(self) -> bool:
        """Whether somebody reads its output."""
        return self._log.is_read

    def info(self, *, usage: bool = True) -> JobInfo:
        """Everything known of the job now. HostError if its log cannot be read.

        Without `usage` a running job's is unknown: to know it takes reading a dozen files.
        """
        used = self.cgroup.usage() if usage and not self._job.ending and self.cgroup is not None else Usage()
        # Of a running job these files are being written, so they are in memory; of an ended one they may not be.
        try:
            bounds = self._final_bounds or self._log.bounds()
        except OSError as exc:
            raise HostError(f"cannot read log of job {self.job_id}: {exc.strerror}") from exc
        return self._job.info(used, *bounds)

    async def wait(self) -> JobInfo:
        """Wait until the job has ended and all of it is gone."""
        await self._ended.wait()
        return self.info()

    async def stop(self, *, grace: float | None = None, by: str = "") -> JobInfo:
        """End the job: its stop signal, `grace` seconds (the job's own grace period if None), then the kill of its whole tree.

        Returns as soon as the job is gone. Stopping a job that has ended is no error. Cancelling the call does not take the stop
        back. Raises StopFailed if the tree is not gone 5 s after the kill.
        """
        seconds = self._own_grace() if grace is None else grace
        if not 0 <= seconds <= MAX_GRACE:
            raise InvalidRequest("grace", f"{seconds} is not between 0 and {MAX_GRACE}", verb=f"stop job {self.job_id}")
        return await self._end("stopped", seconds, by)

    async def end_with_server(self, grace: float, by: str) -> JobInfo:
        """As `stop`, told as `shutdown`; `grace` shortens the job's own grace period and never extends it."""
        return await self._end("shutdown", min(self._own_grace(), grace), by)

    def _own_grace(self) -> float:
        grace = self.record.spec.grace
        return self._runner.config.grace if grace is None else grace

    async def _end(self, reason: str, seconds: float, by: str) -> JobInfo:
        if not self.ended:
            request = StopRequest(reason=reason, signal=signal_number(self.record.spec.stop_signal), grace=seconds, by=by)
            await self._runner.finish(self._ask_to_stop(request))
            try:
                async with asyncio.timeout(seconds + GONE_AFTER_KILL):
                    await self._ended.wait()
            except TimeoutError as exc:
                why = f"its processes are not gone {GONE_AFTER_KILL:g} s after the kill (uninterruptible sleep?)"
                raise StopFailed(self.job_id, why) from exc
        return self.info()

    async def _ask_to_stop(self, request: StopRequest) -> None:
        # One at a time: each replaces the file. Whoever asked first stopped it; later ones can only shorten the grace period.
        async with self._stopping:
            if self.stop_asked_by is None:
                self.stop_asked_by = request.by
            # Order: the file first, durably, then the line. A stop that was asked for holds even if this server dies in between.
            # A disk that is full, or stalls, must not keep a job alive: without the file the shim takes the job's own signal and
            # grace period.
            write = self._runner.tasks.spawn(self._write_stop(request))
            if not (await asyncio.wait((write,), timeout=DURABLE_WITHIN))[0]:
                why = f"the disk has not taken it in {DURABLE_WITHIN:g} s"
                logger.error("cannot write stop of job %s: %s; it is asked to stop all the same", self.job_id, why)
                write.add_done_callback(lambda _: self._say_stop())  # again: now with the grace period that was asked for
        self._say_stop()

    def _say_stop(self) -> None:
        if self.shim is not None and not self.ended:
            self.shim.send(b"stop\n")

    async def _write_stop(self, request: StopRequest) -> None:
        try:
            await anyio.to_thread.run_sync(self._runner.state.write_stop, self.job_id, request)
        except OSError as exc:
            logger.error("cannot write stop of job %s: %s; it is asked to stop all the same", self.job_id, exc.strerror)

    def log(
        self,
        offset: int = 0,
        *,
        follow: bool = True,
        streams: Collection[Stream] = tuple(Stream),
        tail: int | None = None,
        since: float | None = None,
        until: float | None = None,
        exact_times: bool = False,
    ) -> LogReader:
        """A reader of the job's output; with `follow` it ends with the job, otherwise with what is there.

        From a byte offset on, or the last `tail` lines; what was written from `since` on and before `until`, seconds since the
        epoch: `output.Selection` says it exactly. Raises InvalidRequest; the reader raises OffsetOutOfRange past the end of the log
        of a job that has ended.
        """
        return self.read(
            Selection(
                offset=offset,
                follow=follow,
                streams=frozenset(streams),
                tail=tail,
                since=since,
                until=until,
                exact_times=exact_times,
            )
        )

    def read(self, selection: Selection) -> LogReader:
        """As `log`, of a selection that was made before."""
        return self._log.reader(selection)

    def read_bounds(self) -> tuple[int, int]:
        """(first offset that is still there, end offset) of the log, from disk."""
        return self._log.bounds()

    def mark_ended(self, ending: Ending, bounds: tuple[int, int]) -> None:
        """Everything is settled: let everyone who waits, and every reader at the end, know."""
        self._job.end(ending)
        self._final_bounds = bounds
        self._ended.set()
        self._runner.inotify.wake(str(self._log.directory))
