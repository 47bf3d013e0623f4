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
import errno
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any, TypeVar

import anyio.to_thread

from jobrunner import places, recovery, sandbox
from jobrunner.catalog import Catalog
from jobrunner.config import RunnerConfig
from jobrunner.errors import (
    InvalidRequest,
    JobNotFound,
    JobRunnerError,
    LimitReached,
    RequestConflict,
    StartFailed,
    Unavailable,
)
from jobrunner.handle import RunnerJob
from jobrunner.identity import Identities, split
from jobrunner.job import EndReason, JobSpec, JobStatus, Limits, Workspace
from jobrunner.linux import disk
from jobrunner.linux.cgroup import CgroupHost, JobCgroup, detect
from jobrunner.linux.host import host_facts
from jobrunner.linux.inotify import Inotify
from jobrunner.linux.seccomp import compile_filter
from jobrunner.linux.user import identity
from jobrunner.log import ChunkCache
from jobrunner.record import JobRecord, fingerprint
from jobrunner.requests import request_key
from jobrunner.retention import Retention
from jobrunner.statedir import StateDir
from jobrunner.workspace import Workspaces

__all__ = ["JobRunner", "RunnerJob"]

logger = logging.getLogger(__name__)
T = TypeVar("T")
REACH_AGAIN = 1.0
"""Seconds between attempts to reach a shim that could not be reached for want of file descriptors, say."""
FINISH_TIMEOUT = 5.0
"""Seconds that what is half done gets to finish when the runner is closed; recovery does the rest."""


class JobRunner:
    """The jobs of one state directory. Make it with `open`."""

    def __init__(self, config: RunnerConfig, state: StateDir, cgroups: CgroupHost, inotify: Inotify, calls: bytes) -> None:
        self.config = config
        self.state = state
        self.cgroups = cgroups
        self.inotify = inotify
        self.calls = calls
        self.defaults = places.defaults(config, state.projects)
        """Of jobs' limits: the configured ones, and what this host adds."""
        keeper, *uids = split(*config.job_uids)
        self.identities = Identities(*uids)
        self.looks = places.Looks()
        self.walks = anyio.CapacityLimiter(8)
        """Threads for trees that jobs have made, however large: starts never wait for these."""
        self.workspaces = Workspaces(state, keeper, config.workspaces_per_user, config.workspace_size)
        self.host = host_facts()
        self.chunks = ChunkCache()
        self.catalog = Catalog(self)
        self.started = 0
        """Jobs that were started by this runner."""
        self.endings: Counter[tuple[JobStatus, EndReason]] = Counter()
        """How jobs have ended since it was opened."""
        self._running: dict[str, RunnerJob] = {}
        self._retention = Retention(self)
        self._changed = asyncio.Event()
        self._closing = ""
        self._starting: Counter[str] = Counter()
        """Starts under way, by user."""
        self._watchers: set[asyncio.Task[None]] = set()
        self._unfinished: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"<JobRunner {self.state.path} {self.running} running of {len(self.catalog.jobs)}>"

    @classmethod
    @asynccontextmanager
    async def open(cls, config: RunnerConfig, *, wait: bool = True) -> AsyncIterator[JobRunner]:
        """Take hold of the state directory and of the jobs in it. Leaving it lets running jobs run on under their shims.

        Without `wait` it does not wait for the jobs that have ended: they are loaded beside, and what needs them waits.
        Raises HostError if the directory is taken, or the host lacks what jobs need.
        """
        await anyio.to_thread.run_sync(sandbox.check_host, config)
        calls = await anyio.to_thread.run_sync(compile_filter)
        with (
            contextlib.closing(StateDir(config.state_dir.resolve(), config.project_ids)) as state,
            contextlib.closing(Inotify()) as inotify,
        ):
            cgroups = detect(config.cgroup_parent, sandbox.base_name(state.path))
            with contextlib.closing(cgroups):
                sandbox.check_limits(config, cgroups)
                runner = cls(config, state, cgroups, inotify, calls)
                try:
                    await runner._recover()
                    if wait:
                        await runner.loaded()
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
        return len(self._running)

    async def _recover(self) -> None:
        found = await recovery.recover(self)
        self.catalog.expect(found.settled)
        self._spawn(recovery.tidy(self, found))
        self._beside(self._load(found.settled))

    async def _load(self, ended: list[str]) -> None:
        await self.catalog.load(ended)
        await self._retention.run()

    @property
    def is_closing(self) -> bool:
        """Whether it takes no new jobs."""
        return bool(self._closing)

    async def loaded(self) -> None:
        """Wait until every job that the state directory has is known."""
        await self.catalog.loaded.wait()

    async def get(self, job_id: str) -> RunnerJob:
        """The job of this id. Raises JobNotFound; HostError if its record cannot be read now."""
        return await self.catalog.get(job_id)

    async def list(self) -> list[RunnerJob]:
        """All jobs, newest first."""
        await self.loaded()
        jobs = []
        for entry in self.catalog.jobs.newest_first():
            with contextlib.suppress(JobNotFound):
                jobs.append(await self.get(entry.job_id))
        return jobs

    async def start(self, spec: JobSpec, *, user: str = "") -> RunnerJob:
        """Start a job; returns when its command has been executed. A call that is cancelled leaves a start that goes on.

        The same `spec.request_id` of the same user gives the same job again, also after a restart; JobRemoved once that job is
        removed, for 24 hours. Raises InvalidRequest, LimitReached, RequestConflict, and StartFailed with the step and the reason;
        then nothing is left of it.
        """
        key, mark = request_key(user, spec.request_id) if spec.request_id else b"", fingerprint(spec)
        if key and self.catalog.requests.find(key) is None:
            await self.loaded()
        claim = self.catalog.requests.find(key) if key else None
        if claim is not None:
            if claim.fingerprint.hex() != mark[:32]:
                raise RequestConflict(spec.request_id)
            if isinstance(claim.job, str):
                return await self.catalog.started(spec.request_id, claim.job)
            return await asyncio.shield(claim.job)
        limits = self._check(spec, user)
        # Order: in the same step as the check, or starts at once would pass the bounds together.
        self._starting[user] += 1
        starting = self._spawn(self._start(spec, mark, limits, user))
        starting.add_done_callback(lambda _: self._start_is_over(user))
        if key:
            self.catalog.requests.begin(key, mark, starting)
        return await asyncio.shield(starting)

    async def remove(self, job_id: str) -> None:
        """Remove an ended job's record and log. Raises JobNotFound, InvalidRequest if it still runs; HostError if it cannot be."""
        job = await self.get(job_id)
        if not job.ended:
            raise InvalidRequest("job_id", f"job {job_id} is running", verb="remove job")
        await self.catalog.drop([job_id])

    def _check(self, spec: JobSpec, user: str) -> Limits:
        """The limits to apply. Raises InvalidRequest for what this host's configuration does not allow."""
        places.check(spec, user, self.config)
        limits = spec.limits.over(self.defaults)
        limits.check_ceilings(self.config.ceilings)
        if self._closing:
            raise Unavailable(f"cannot start job: the server is {self._closing}")
        if self.running + self._starting.total() >= self.config.max_running:
            raise LimitReached("start job", "max_running", f"{self.config.max_running} jobs are running")
        most = self.config.max_running_per_user
        if sum(job.record.user == user for job in self._running.values()) + self._starting[user] >= most:
            raise LimitReached("start job", "max_running_per_user", f'{most} jobs of user "{user}" are running; stop one')
        return limits

    async def _start(self, spec: JobSpec, mark: str, limits: Limits, user: str) -> RunnerJob:
        job_id = self._new_id()
        own = self.config.offers.users[spec.user].id if spec.user else None
        uid = self.identities.take() if own is None else own.uid
        gid = uid if own is None else own.gid
        try:
            self.workspaces.hold(spec, user, job_id)
            cgroup = self._make_cgroup(job_id, spec, limits)
        except BaseException:
            self.workspaces.release(job_id)
            self.identities.give_back(uid)
            raise
        created, node = time.time(), self.config.node
        missing, work = (*cgroup.missing, *identity()), places.work_kind(limits, self.state.projects)
        record = JobRecord(job_id, spec, limits, user, node, created, mark, cgroup.paths, missing, uid, gid, work)
        try:
            await anyio.to_thread.run_sync(self.state.create, record)
        except OSError as exc:
            await self._undo(record, cgroup)
            raise StartFailed(spec.command, "record", exc.errno or 0) from exc
        # From here on a start that is cut short is recovery's: it alone can tell whether the job runs.
        try:
            mounts = await places.mounts(record, self.config, self.state, self.workspaces, self.looks)
            started = await sandbox.launch(record, cgroup, self.state.directory(job_id), self.config, self.calls, mounts)
        except (StartFailed, LimitReached):
            await self._undo(record, cgroup)
            raise
        except sandbox.LauncherLost as exc:
            if await anyio.to_thread.run_sync(self._claimed, job_id):
                cgroup.kill()
                await self._undo(record, cgroup)
                raise StartFailed(spec.command, "launcher", 0, "it was killed") from exc
            started = created
        self.started += 1
        return self.adopt(record, cgroup, started)

    async def list_workspaces(self) -> Sequence[Workspace]:
        """The directories that are kept, of all users."""
        return await anyio.to_thread.run_sync(self.workspaces.list, limiter=self.walks)

    async def remove_workspace(self, user: str, name: str) -> None:
        """Remove one that no job has. Raises InvalidRequest."""
        self.workspaces.claim(user, name)
        await self.finish(anyio.to_thread.run_sync(self.workspaces.remove, user, name, limiter=self.walks))

    def _new_id(self) -> str:
        while True:
            job_id = secrets.token_hex(6)
            if job_id not in self.catalog.jobs and not self.state.directory(job_id).exists():
                return job_id

    def _claimed(self, job_id: str) -> bool:
        """False if a shim was first, or nobody can tell: then it is a job until it is found to have none."""
        try:
            return self.state.claim(job_id)
        except OSError as exc:
            logger.error("cannot tell whether job %s was started: %s", job_id, exc)
            return False

    async def _undo(self, record: JobRecord, cgroup: JobCgroup) -> None:
        """Leave nothing of a start that failed; what cannot be removed is told, and the next server does it."""
        gone = await cgroup.removed()
        self.workspaces.release(record.job_id)
        try:
            if not gone:
                raise OSError(errno.EBUSY, "its cgroup is busy")
            await anyio.to_thread.run_sync(self.state.remove, record.job_id)
        except OSError as exc:
            logger.error("cannot remove what is left of job %s, which was not started: %s", record.job_id, exc.strerror)
            return
        self.identities.give_back(record.uid)

    def _make_cgroup(self, job_id: str, spec: JobSpec, limits: Limits) -> JobCgroup:
        explicit = {f.name for f in fields(Limits) if getattr(spec.limits, f.name) is not None}
        disks = disk.disks_under([self.state.path, "/", *disk.mounted_on_disks()])
        return self.cgroups.create(job_id, limits, disks, self.config.allow_missing, explicit)

    def adopt(self, record: JobRecord, cgroup: JobCgroup, started: float, stop_asked_by: str | None = None) -> RunnerJob:
        """Take a job whose shim was started, now or by a server before this one, and watch it to its end."""
        job = RunnerJob(record, self, cgroup, started)
        job.stop_asked_by = stop_asked_by
        self._running[job.job_id] = job
        self.workspaces.keep(record)
        self.catalog.add(job)
        self._beside(self._watch(job, self._reach(job)))
        return job

    def end(self, job: RunnerJob, left: recovery.Left) -> None:
        """The job has ended, and nothing of it is left but its record and its log."""
        self._running.pop(job.job_id, None)
        self.workspaces.release(job.job_id)
        ending = left.ending()
        self.catalog.jobs.end(job.job_id, ending.status, ending.ended, left.size)
        self.endings[ending.status, ending.reason] += 1
        job.mark_ended(ending, left.bounds)
        self._retention.wake()
        self._changed.set()

    def forget(self, job: RunnerJob) -> None:
        """The job turned out never to have run."""
        self._running.pop(job.job_id, None)
        self.workspaces.release(job.job_id)
        self.catalog.forget(job.job_id)

    def _reach(self, job: RunnerJob) -> bool:
        """Open the job's `ctl`; False if that failed, which says nothing about the shim."""
        try:
            job.shim = sandbox.ShimHandle.open(self.state.directory(job.job_id))
        except OSError as exc:
            logger.error("cannot reach shim of job %s: %s; trying again", job.job_id, exc.strerror)
            return False
        if job.shim is not None and job.stop_asked_by is not None:
            job.shim.send(b"stop\n")  # it was asked for while nobody could be told, or before a crash
        return True

    async def _watch(self, job: RunnerJob, reached: bool) -> None:
        while not reached:
            await asyncio.sleep(REACH_AGAIN)
            reached = self._reach(job)
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

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what goes on until the runner is closed, at most."""
        task = asyncio.get_running_loop().create_task(work)
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)
        task.add_done_callback(_tell_unexpected)

    def _start_is_over(self, user: str) -> None:
        self._starting -= Counter((user,))  # which forgets who has none
        self._changed.set()

    async def settled(self) -> None:
        """Wait until every start, stop, end and removal that is under way now is done."""
        if self._unfinished:
            await asyncio.wait(self._unfinished, timeout=FINISH_TIMEOUT)

    async def stop_all(self, *, grace: float, by: str = "") -> None:
        """End every job that runs, because the server ends: each has its own grace period, but at most `grace` seconds.

        Admits no start from here on. Returns when all are gone; what cannot be stopped is told in the log.
        """
        self._closing = "shutting down"
        await self.settled()  # a start that was under way has its job now
        running = list(self._running.values())
        for end in await asyncio.gather(*(job.end_with_server(grace, by) for job in running), return_exceptions=True):
            if isinstance(end, BaseException):
                logger.error("%s", end)

    async def drain(self) -> None:
        """Admit no start from here on, and return when the last job has ended."""
        self._closing = "draining"
        while self._running or self._starting:
            self._changed.clear()
            await self._changed.wait()

    async def _detach(self) -> None:
        """Let go of all jobs: those that run go on under their shims; what is half done is finished first."""
        self._closing = "shutting down"  # Order: before those that wait for request ids are let go
        for watcher in self._watchers:
            watcher.cancel()
        await self.settled()
        for job in self._running.values():
            if job.shim is not None:
                job.shim.close()


def _tell_unexpected(task: asyncio.Task[Any]) -> None:
    """Whoever awaits the task hears of its error; what is no error of jobrunner's own vocabulary is a bug and told here too."""
    if not task.cancelled() and (exc := task.exception()) is not None and not isinstance(exc, JobRunnerError):
        logger.error("unexpected error in %s", task.get_name(), exc_info=exc)
