"""The library: jobs on this host. Read this file first.

    async with JobRunner.open(RunnerConfig(state_dir=...)) as runner:
        job = await runner.start(JobSpec("make", ["-j2"]))
        async with job.log() as output:
            async for part in output: ...
        info = await job.wait()

Life of a job here: `start` checks the request against the configuration, makes the cgroup, writes the record durably, and lets
`sandbox.launch` start the shim. From then on the shim alone supervises: this module asks it to stop (`ctl`), hears that it is gone,
and settles the job from what it left behind. A job that was found at start-up (`recovery`) is the same to it as one just started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Collection, Coroutine
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any, TypeVar

import anyio.to_thread

from jobrunner import recovery, sandbox
from jobrunner.config import RunnerConfig
from jobrunner.errors import InvalidRequest, JobNotFound, JobRunnerError, LimitReached, RequestConflict, StopFailed
from jobrunner.job import Ending, Job, JobInfo, JobSpec, JobStatus, Limits, Stream, Usage, signal_number
from jobrunner.linux import disk
from jobrunner.linux.cgroup import CgroupHost, JobCgroup, detect
from jobrunner.linux.inotify import Inotify
from jobrunner.log import ChunkCache, Log, LogReader
from jobrunner.record import JobRecord, StateDir, fingerprint
from jobrunner.shim.stopfile import StopRequest

__all__ = ["JobRunner", "RunnerJob"]

logger = logging.getLogger(__name__)
T = TypeVar("T")
NOT_BUILT = ("root", "writable", "user", "volumes", "workspace", "stdin")
NOT_BUILT_LIMITS = ("tmp_size",)
GONE_AFTER_KILL = 5.0
"""Seconds that a killed tree may take to go away before a stop is told as failed."""


class RunnerJob:
    """A job of this host: the handle that `start` and `get` give."""

    def __init__(self, record: JobRecord, runner: JobRunner, cgroup: JobCgroup | None, started: float) -> None:
        self.job_id = record.job_id
        self.record = record
        self.cgroup = cgroup
        self._job = Job(
            record.job_id, record.spec, record.limits, record.user, record.node, record.created, started, record.missing
        )
        self.shim: sandbox.ShimHandle | None = None
        self._runner = runner
        self._ended = asyncio.Event()
        self._stopping = asyncio.Lock()
        self._log = Log(self, runner.state.directory(self.job_id) / "log", runner.chunks, runner.inotify.changed)

    def __repr__(self) -> str:
        return f"<RunnerJob {self.job_id} {self.status} {self.record.spec.command!r}>"

    @property
    def status(self) -> JobStatus:
        """running, completed, failed or terminated."""
        return self._job.status

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def info(self) -> JobInfo:
        """Everything known of the job now."""
        usage = Usage() if self._job.ending or self.cgroup is None else self.cgroup.usage()
        return self._job.info(usage, *self._log.bounds())

    async def wait(self) -> JobInfo:
        """Wait until the job has ended and all of it is gone."""
        await self._ended.wait()
        return self.info()

    async def stop(self, *, grace: float | None = None, by: str = "") -> JobInfo:
        """End the job: its stop signal, `grace` seconds (the job's own grace period if None), then the kill of its whole tree.

        Returns as soon as the job is gone. Stopping a job that has ended is no error. Cancelling the call does not take the stop
        back. Raises StopFailed if the tree is not gone 5 s after the kill.
        """
        spec = self.record.spec
        seconds = next(value for value in (grace, spec.grace, self._runner.config.grace) if value is not None)
        if not 0 <= seconds <= 86400:
            raise InvalidRequest("grace", f"{seconds} is not between 0 and 86400", verb=f"stop job {self.job_id}")
        return await self._end("stopped", seconds, by)

    async def end_with_server(self, grace: float, by: str) -> JobInfo:
        """As `stop`, told as `shutdown`; `grace` shortens the job's own grace period and never extends it."""
        own = self._runner.config.grace if self.record.spec.grace is None else self.record.spec.grace
        return await self._end("shutdown", min(own, grace), by)

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
            # Order: the file first, durably, then the line. A stop that was asked for holds even if this server dies in between.
            await anyio.to_thread.run_sync(self._runner.state.write_stop, self.job_id, request)
        if self.shim is not None:
            self.shim.send(b"stop\n")

    def log(self, offset: int = 0, *, follow: bool = True, streams: Collection[Stream] = tuple(Stream)) -> LogReader:
        """A reader of the job's output from a byte offset on; with `follow` it ends with the job, otherwise with what is there.

        Raises InvalidRequest for a negative offset; the reader raises OffsetOutOfRange past the end of an ended log.
        """
        if offset < 0:
            raise InvalidRequest("offset", f"{offset} is negative", verb="read log")
        return self._log.reader(offset, follow, streams)

    def mark_ended(self, ending: Ending) -> None:
        """Everything is settled: let everyone who waits, and every reader at the end, know."""
        self._job.end(ending)
        self._runner.alive.discard(self.job_id)
        self._ended.set()
        self._runner.inotify.wake(str(self._log.directory))


class JobRunner:
    """The jobs of one state directory. Make it with `open`."""

    def __init__(self, config: RunnerConfig, state: StateDir, cgroups: CgroupHost, inotify: Inotify) -> None:
        self.config = config
        self.state = state
        self.cgroups = cgroups
        self.inotify = inotify
        self.chunks = ChunkCache()
        self.alive: set[str] = set()
        """Ids of the jobs that have not ended; counted at every start, where walking through all that are kept would cost."""
        self._jobs: dict[str, RunnerJob] = {}
        self._requests: dict[tuple[str, str], tuple[str, asyncio.Future[RunnerJob]]] = {}
        self._starting = 0
        self._watchers: set[asyncio.Task[None]] = set()
        self._unfinished: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"<JobRunner {self.state.path} {self.running} running of {len(self._jobs)}>"

    @classmethod
    @asynccontextmanager
    async def open(cls, config: RunnerConfig) -> AsyncIterator[JobRunner]:
        """Take hold of the state directory and of the jobs in it. Leaving it lets running jobs run on under their shims.

        Raises HostError if the directory is taken, or the host lacks what jobs need.
        """
        await anyio.to_thread.run_sync(sandbox.check_host, config)
        with contextlib.closing(StateDir(config.state_dir.resolve())) as state, contextlib.closing(Inotify()) as inotify:
            cgroups = detect(config.cgroup_parent, sandbox.base_name(state.path))
            with contextlib.closing(cgroups):
                sandbox.check_limits(config, cgroups)
                runner = cls(config, state, cgroups, inotify)
                try:
                    await recovery.recover(runner)
                    yield runner
                finally:
                    await runner._detach()

    @property
    def cgroup_version(self) -> str:
        """`v1`, `hybrid` or `v2`."""
        return self.cgroups.version

    @property
    def running(self) -> int:
        """How many jobs run now."""
        return len(self.alive)

    def get(self, job_id: str) -> RunnerJob:
        """The job of this id. Raises JobNotFound."""
        try:
            return self._jobs[job_id]
        except KeyError:
            raise JobNotFound(job_id) from None

    def list(self) -> list[RunnerJob]:
        """All jobs, newest first."""
        return sorted(self._jobs.values(), key=lambda job: (job.record.created, job.job_id), reverse=True)

    async def start(self, spec: JobSpec, *, user: str = "") -> RunnerJob:
        """Start a job; returns when its command has been executed. A call that is cancelled leaves a start that goes on.

        The same `spec.request_id` of the same user gives the same job again. Raises InvalidRequest, LimitReached, RequestConflict,
        and StartFailed with the step and the reason; then nothing is left of it.
        """
        limits = self._check(spec)
        if not spec.request_id:
            return await self.finish(self._start(spec, limits, user))
        key, digest = (user, spec.request_id), fingerprint(spec)
        if key not in self._requests:
            starting = self._spawn(self._start(spec, limits, user))
            self._requests[key] = (digest, starting)
            starting.add_done_callback(lambda done: self._forget_failed(key, done))
        known, job = self._requests[key]
        if known != digest:
            raise RequestConflict(spec.request_id)
        return await asyncio.shield(job)

    async def remove(self, job_id: str) -> None:
        """Remove an ended job's record and log. Raises JobNotFound, and InvalidRequest if it still runs."""
        job = self.get(job_id)
        if not job.ended:
            raise InvalidRequest("job_id", f"job {job_id} is running", verb="remove job")
        del self._jobs[job_id]
        self._requests.pop((job.record.user, job.record.spec.request_id), None)
        await self.finish(anyio.to_thread.run_sync(self.state.remove, job_id))

    def _check(self, spec: JobSpec) -> Limits:
        """The limits to apply. Raises InvalidRequest for what this host's configuration does not allow."""
        for name in NOT_BUILT:
            if getattr(spec, name):
                raise InvalidRequest(name, "this server does not offer it")
        if spec.network not in ("", "none"):
            raise InvalidRequest("network", f"{spec.network!r} is not offered by this server, only 'none'")
        for name in NOT_BUILT_LIMITS:
            if getattr(spec.limits, name) is not None:
                raise InvalidRequest(f"limits.{name}", "this server does not offer it")
        limits = spec.limits.over(self.config.defaults)
        limits.check_ceilings(self.config.ceilings)
        if self.running + self._starting >= self.config.max_running:
            raise LimitReached("start job", "max_running", f"{self.config.max_running} jobs are running")
        return limits

    async def _start(self, spec: JobSpec, limits: Limits, user: str) -> RunnerJob:
        job_id = secrets.token_hex(6)
        while job_id in self._jobs:
            job_id = secrets.token_hex(6)
        self._starting += 1
        cgroup: JobCgroup | None = None
        try:
            cgroup = self._make_cgroup(job_id, spec, limits)
            record = JobRecord(
                job_id, spec, limits, user, self.config.node, time.time(), fingerprint(spec), cgroup.paths, cgroup.missing
            )
            await anyio.to_thread.run_sync(self.state.create, record)
            started = await sandbox.launch(record, cgroup, self.state.directory(job_id), self.config)
            return self.adopt(record, cgroup, started)
        except BaseException:
            if cgroup is not None:
                await cgroup.removed()
            await anyio.to_thread.run_sync(self.state.remove, job_id)
            raise
        finally:
            self._starting -= 1

    def _make_cgroup(self, job_id: str, spec: JobSpec, limits: Limits) -> JobCgroup:
        explicit = {f.name for f in fields(Limits) if getattr(spec.limits, f.name) is not None}
        disks = disk.disks_under([self.state.path, "/"])
        return self.cgroups.create(job_id, limits, disks, self.config.allow_missing, explicit)

    def adopt(self, record: JobRecord, cgroup: JobCgroup, started: float) -> RunnerJob:
        """Take a job whose shim was started, now or by a server before this one, and watch it to its end."""
        job = RunnerJob(record, self, cgroup, started)
        self._jobs[job.job_id] = job
        self.alive.add(job.job_id)
        job.shim = sandbox.ShimHandle.open(self.state.directory(job.job_id))
        watcher = asyncio.get_running_loop().create_task(self._watch(job))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        watcher.add_done_callback(_tell_unexpected)
        return job

    def adopt_settled(self, record: JobRecord, started: float, ending: Ending) -> RunnerJob:
        """Take a job that had ended and was settled before this server started."""
        job = RunnerJob(record, self, None, started)
        self._jobs[job.job_id] = job
        job.mark_ended(ending)
        return job

    def remember_request(self, job: RunnerJob) -> None:
        """A request id of a job that was found at start-up still gives that job."""
        if job.record.spec.request_id:
            done: asyncio.Future[RunnerJob] = asyncio.get_running_loop().create_future()
            done.set_result(job)
            self._requests[job.record.user, job.record.spec.request_id] = (job.record.fingerprint, done)

    async def _watch(self, job: RunnerJob) -> None:
        if job.shim is not None:
            await job.shim.gone()
            job.shim.close()
        await self.finish(recovery.settle(self, job))

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run what must not be cut in half: cancelling the caller leaves it running."""
        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        task.add_done_callback(_tell_unexpected)
        return task

    def _forget_failed(self, key: tuple[str, str], task: asyncio.Task[RunnerJob]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._requests.pop(key, None)

    async def settled(self) -> None:
        """Wait until every start, stop, end and removal that is under way now is done."""
        if self._unfinished:
            await asyncio.wait(self._unfinished, timeout=GONE_AFTER_KILL)

    async def stop_all(self, *, grace: float, by: str = "") -> None:
        """End every job that runs, because the server ends: each has its own grace period, but at most `grace` seconds.

        The caller admits no start from before this call on. Returns when all are gone; what cannot be stopped is told in the log.
        """
        await self.settled()  # a start that was under way has its job now
        running = [job for job in self._jobs.values() if not job.ended]
        for end in await asyncio.gather(*(job.end_with_server(grace, by) for job in running), return_exceptions=True):
            if isinstance(end, StopFailed):
                logger.error("%s", end.message)
            elif isinstance(end, BaseException):
                raise end

    async def _detach(self) -> None:
        """Let go of all jobs: those that run go on under their shims; what is half done is finished first."""
        for watcher in self._watchers:
            watcher.cancel()
        await self.settled()
        for job in self._jobs.values():
            if job.shim is not None:
                job.shim.close()


def _tell_unexpected(task: asyncio.Task[Any]) -> None:
    """Whoever awaits the task hears of its error; what is no error of jobrunner's own vocabulary is a bug and told here too."""
    if not task.cancelled() and (exc := task.exception()) is not None and not isinstance(exc, JobRunnerError):
        logger.error("unexpected error in %s", task.get_name(), exc_info=exc)
