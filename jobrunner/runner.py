"""The library: jobs on this host. Read this file first.

    async with JobRunner.open(RunnerConfig(state_dir=...)) as runner:
        job = await runner.start(JobSpec("make", ["-j2"]))
        async with job.log() as output:
            async for part in output: ...
        info = await job.wait()

Life of a job here: `start` (start.py) checks the request against the configuration, makes the cgroup, writes the record durably,
and has the launcher start the shim. From then on the shim alone supervises: this module asks it to stop (`ctl`), hears that it is
gone, and settles the job from what it left behind. A job that was found at start-up (`recovery`) is the same as one just started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio.to_thread

from jobrunner import places, recovery, sandbox
from jobrunner.catalog import Catalog
from jobrunner.config import RunnerConfig
from jobrunner.errors import InvalidRequest, JobNotFound
from jobrunner.handle import RunnerJob
from jobrunner.identity import Identities, split
from jobrunner.job import EndReason, JobSpec, JobStatus, Workspace
from jobrunner.linux.cgroup import CgroupHost, JobCgroup, detect
from jobrunner.linux.host import host_facts
from jobrunner.linux.inotify import Inotify
from jobrunner.linux.seccomp import compile_filter
from jobrunner.linux.subids import SubIds
from jobrunner.log import ChunkCache
from jobrunner.record import JobRecord
from jobrunner.retention import Retention
from jobrunner.start import Starts
from jobrunner.statedir import StateDir
from jobrunner.tasks import Tasks
from jobrunner.workspace import Workspaces

__all__ = ["JobRunner", "RunnerJob"]

logger = logging.getLogger(__name__)
T = TypeVar("T")
REACH_AGAIN = 1.0
"""Seconds between attempts to reach a shim that could not be reached for want of file descriptors, say."""


class JobRunner:
    """The jobs of one state directory. Make it with `open`."""

    def __init__(
        self, config: RunnerConfig, state: StateDir, cgroups: CgroupHost, inotify: Inotify, calls: bytes, ids: SubIds | None = None
    ) -> None:
        self.config = config
        self.state = state
        self.cgroups = cgroups
        self.inotify = inotify
        self.calls = calls
        self.defaults = places.defaults(config, state.projects)
        """Of jobs' limits: the configured ones, and what this host adds."""
        self.ids = ids
        """Of jobs, where this process is not root and has some to give."""
        keeper, *uids = split(ids.first, ids.count) if ids else split(*config.job_uids)
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
        self.running_jobs: dict[str, RunnerJob] = {}
        self.closing = ""
        """Why it takes no new jobs."""
        self.tasks = Tasks()
        self.changed = asyncio.Event()
        """Set when a start is over or a job has ended."""
        self._starts = Starts(self)
        self._retention = Retention(self)

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
        ids = await anyio.to_thread.run_sync(sandbox.own_ids, config)
        with (
            contextlib.closing(StateDir(config.state_dir.resolve(), config.project_ids)) as state,
            contextlib.closing(Inotify()) as inotify,
        ):
            cgroups = detect(config.cgroup_parent, sandbox.base_name(state.path))
            with contextlib.closing(cgroups):
                sandbox.check_limits(config, cgroups, ids is not None)
                runner = cls(config, state, cgroups, inotify, calls, ids)
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
        return len(self.running_jobs)

    async def _recover(self) -> None:
        found = await recovery.recover(self)
        self.catalog.expect(found.settled)
        self.tasks.spawn(recovery.tidy(self, found))
        self.tasks.beside(self._load(found.settled))

    async def _load(self, ended: list[str]) -> None:
        await self.catalog.load(ended)
        await self._retention.run()

    @property
    def is_closing(self) -> bool:
        """Whether it takes no new jobs."""
        return bool(self.closing)

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
        return await self._starts.start(spec, user)

    async def remove(self, job_id: str) -> None:
        """Remove an ended job's record and log. Raises JobNotFound, InvalidRequest if it still runs; HostError if it cannot be."""
        job = await self.get(job_id)
        if not job.ended:
            raise InvalidRequest("job_id", f"job {job_id} is running", verb="remove job")
        await self.catalog.drop([job_id])

    async def list_workspaces(self) -> Sequence[Workspace]:
        """The directories that are kept, of all users."""
        return await anyio.to_thread.run_sync(self.workspaces.list, limiter=self.walks)

    async def remove_workspace(self, user: str, name: str) -> None:
        """Remove one that no job has. Raises InvalidRequest."""
        self.workspaces.claim(user, name)
        await self.finish(anyio.to_thread.run_sync(self.workspaces.remove, user, name, limiter=self.walks))

    def adopt(self, record: JobRecord, cgroup: JobCgroup, started: float, stop_asked_by: str | None = None) -> RunnerJob:
        """Take a job whose shim was started, now or by a server before this one, and watch it to its end."""
        job = RunnerJob(record, self, cgroup, started)
        job.stop_asked_by = stop_asked_by
        self.running_jobs[job.job_id] = job
        self.workspaces.keep(record)
        self.catalog.add(job)
        self.tasks.beside(self._watch(job, self._reach(job)))
        return job

    def end(self, job: RunnerJob, left: recovery.Left) -> None:
        """The job has ended, and nothing of it is left but its record and its log."""
        self.running_jobs.pop(job.job_id, None)
        self.workspaces.release(job.job_id)
        ending = left.ending()
        self.catalog.jobs.end(job.job_id, ending.status, ending.ended, left.size)
        self.endings[ending.status, ending.reason] += 1
        job.mark_ended(ending, left.bounds)
        self._retention.wake()
        self.changed.set()

    def forget(self, job: RunnerJob) -> None:
        """The job turned out never to have run."""
        self.running_jobs.pop(job.job_id, None)
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
        return await asyncio.shield(self.tasks.spawn(work))

    async def settled(self) -> None:
        """Wait until every start, stop, end and removal that is under way now is done."""
        await self.tasks.finished()

    async def stop_all(self, *, grace: float, by: str = "") -> None:
        """End every job that runs, because the server ends: each has its own grace period, but at most `grace` seconds.

        Admits no start from here on. Returns when all are gone; what cannot be stopped is told in the log.
        """
        self.closing = "shutting down"
        await self.settled()  # a start that was under way has its job now
        running = list(self.running_jobs.values())
        for end in await asyncio.gather(*(job.end_with_server(grace, by) for job in running), return_exceptions=True):
            if isinstance(end, BaseException):
                logger.error("%s", end)

    async def drain(self) -> None:
        """Admit no start from here on, and return when the last job has ended."""
        self.closing = "draining"
        while self.running_jobs or self._starts.under_way:
            self.changed.clear()
            await self.changed.wait()

    async def _detach(self) -> None:
        """Let go of all jobs: those that run go on under their shims; what is half done is finished first."""
        self.closing = "shutting down"  # Order: before those that wait for request ids are let go
        self.tasks.cancel_beside()
        await self.settled()
        for job in self.running_jobs.values():
            if job.shim is not None:
                job.shim.close()
