"""One start, from the request to the job that runs, or to nothing.

Its steps, in this order:

    admit       the request against the configuration, the bounds and the request ids that are known
    claim       a uid, a workspace and the cgroup with its limits: gone with this process, or swept by the next server
    record      job.json, durable: from here on a start that is cut short is recovery's
    launch      the launcher is told; the command has been executed, or a step failed
    undo        nothing is left of a start that failed
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import time
from collections import Counter
from dataclasses import fields
from typing import TYPE_CHECKING

import anyio.to_thread

from jobrunner import places, sandbox
from jobrunner.errors import LimitReached, RequestConflict, StartFailed, Unavailable
from jobrunner.job import JobSpec, Limits
from jobrunner.launcher import Launcher
from jobrunner.linux import disk
from jobrunner.linux.user import identity
from jobrunner.record import JobRecord, fingerprint
from jobrunner.requests import request_key

if TYPE_CHECKING:
    from jobrunner.handle import RunnerJob
    from jobrunner.linux.cgroup import JobCgroup
    from jobrunner.linux.subids import SubIds
    from jobrunner.runner import JobRunner

__all__ = ["Starts"]

logger = logging.getLogger(__name__)
WAITING = 40
"""Launchers that wait at a time, where more starts are at once: as many as there are threads that write records. Each has three of
this process's descriptors."""


class Starts:
    """The starts of one runner."""

    def __init__(self, runner: JobRunner) -> None:
        self.under_way: Counter[str] = Counter()
        """By user."""
        self._runner = runner
        self._waiting = asyncio.Semaphore(WAITING)

    async def start(self, spec: JobSpec, user: str) -> RunnerJob:
        """As `JobRunner.start` says."""
        catalog = self._runner.catalog
        key, mark = request_key(user, spec.request_id) if spec.request_id else b"", fingerprint(spec)
        if key and catalog.requests.find(key) is None:
            await self._runner.loaded()
        claim = catalog.requests.find(key) if key else None
        if claim is not None:
            if claim.fingerprint.hex() != mark[:32]:
                raise RequestConflict(spec.request_id)
            if isinstance(claim.job, str):
                return await catalog.started(spec.request_id, claim.job)
            return await asyncio.shield(claim.job)
        limits = self._admit(spec, user)
        # Order: in the same step as the check, or starts at once would pass the bounds together.
        self.under_way[user] += 1
        starting = self._runner.tasks.spawn(self._counted(spec, mark, limits, user))
        if key:
            catalog.requests.begin(key, mark, starting)
        return await asyncio.shield(starting)

    async def _counted(self, spec: JobSpec, mark: str, limits: Limits, user: str) -> RunnerJob:
        try:
            return await self._start(spec, mark, limits, user)
        finally:
            # Order: in the same step in which its job becomes a running one, or others would be refused for one that counts twice.
            self.under_way -= Counter((user,))  # which forgets who has none
            self._runner.changed.set()

    def _admit(self, spec: JobSpec, user: str) -> Limits:
        """The limits to apply. Raises InvalidRequest for what this host's configuration does not allow."""
        config, running = self._runner.config, self._runner.running_jobs
        places.check(spec, user, config)
        limits = spec.limits.over(self._runner.defaults)
        limits.check_floors()
        limits.check_ceilings(config.ceilings)
        if self._runner.closing:
            raise Unavailable(f"cannot start job: the server is {self._runner.closing}")
        if len(running) + self.under_way.total() >= config.max_running:
            raise LimitReached("start job", "max_running", f"{config.max_running} jobs are running")
        most = config.max_running_per_user
        if sum(job.record.user == user for job in running.values()) + self.under_way[user] >= most:
            raise LimitReached("start job", "max_running_per_user", f'{most} jobs of user "{user}" are running; stop one')
        return limits.for_kernel()

    async def _start(self, spec: JobSpec, mark: str, limits: Limits, user: str) -> RunnerJob:
        runner = self._runner
        with contextlib.ExitStack() as stack:
            async with self._waiting:
                try:
                    launcher = await Launcher.make()
                except OSError as exc:
                    raise StartFailed(spec.command, "launcher", exc.errno or 0) from exc
                stack.callback(lambda: runner.tasks.spawn(launcher.close()))
                record, cgroup = self._claim(spec, mark, limits, user)
                await self._write(record, cgroup)
            started = await self._launch(launcher, record, cgroup)
        runner.started += 1
        return runner.adopt(record, cgroup, started)

    def _claim(self, spec: JobSpec, mark: str, limits: Limits, user: str) -> tuple[JobRecord, JobCgroup]:
        """What is taken in memory, and the cgroup. Nothing of it is when it fails."""
        runner, config = self._runner, self._runner.config
        job_id = self._new_id()
        own = config.offers.users[spec.user].id if spec.user else None
        uid = runner.identities.take() if own is None else own.uid
        gid = uid if own is None else own.gid
        try:
            runner.workspaces.hold(spec, user, job_id)
            cgroup = self._make_cgroup(job_id, spec, limits)
        except BaseException:
            runner.workspaces.release(job_id)
            runner.identities.give_back(uid)
            raise
        missing = (*cgroup.missing, *identity(self._own_ids(spec) is not None))
        work, created, node = places.work_kind(limits, runner.state.projects), time.time(), config.node
        record = JobRecord(job_id, spec, cgroup.limits, user, node, created, mark, cgroup.paths, missing, uid, gid, work)
        return record, cgroup

    def _own_ids(self, spec: JobSpec) -> SubIds | None:
        """None for a job with something that is kept: that is the server's user's own, and only root could map it to another."""
        return None if spec.volumes or spec.workspace else self._runner.ids

    def _new_id(self) -> str:
        while True:
            job_id = secrets.token_hex(6)
            if job_id not in self._runner.catalog.jobs and not os.path.lexists(self._runner.state.directory(job_id)):
                return job_id

    def _make_cgroup(self, job_id: str, spec: JobSpec, limits: Limits) -> JobCgroup:
        runner = self._runner
        explicit = {f.name for f in fields(Limits) if getattr(spec.limits, f.name) is not None}
        disks = disk.disks_seen([runner.state.path, "/"], places.directories(spec, runner.config))
        return runner.cgroups.create(job_id, limits, disks, runner.config.allow_missing, explicit)

    async def _write(self, record: JobRecord, cgroup: JobCgroup) -> None:
        """Make the record durable. From here on a start that is cut short is recovery's: it alone can tell whether the job runs."""
        try:
            await anyio.to_thread.run_sync(self._runner.state.create, record)
        except OSError as exc:
            await self._undo(record, cgroup)
            raise StartFailed(record.spec.command, "record", exc.errno or 0) from exc

    async def _launch(self, launcher: Launcher, record: JobRecord, cgroup: JobCgroup) -> float:
        """Have the launcher start it; when the command was executed, seconds since the epoch."""
        runner, command = self._runner, record.spec.command
        try:
            mounts = await places.mounts(record, runner.config, runner.state, runner.workspaces, runner.looks)
            started = await sandbox.launch(
                launcher,
                record,
                cgroup,
                runner.state.directory(record.job_id),
                runner.config,
                runner.calls,
                mounts,
                self._own_ids(record.spec),
            )
        except (StartFailed, LimitReached):
            await self._undo(record, cgroup)
            raise
        except sandbox.LauncherLost as exc:
            if await anyio.to_thread.run_sync(self._claimed, record.job_id):
                cgroup.kill()
                await self._undo(record, cgroup)
                raise StartFailed(command, "launcher", 0, "it was killed") from exc
            started = record.created
        return started

    def _claimed(self, job_id: str) -> bool:
        """False if a shim was first, or nobody can tell: then it is a job until it is found to have none."""
        try:
            return self._runner.state.claim(job_id)
        except OSError as exc:
            logger.error("cannot tell whether job %s was started: %s", job_id, exc)
            return False

    async def _undo(self, record: JobRecord, cgroup: JobCgroup) -> None:
        """Leave nothing of a start that failed; what cannot be removed is told, and the next server does it."""
        gone = await cgroup.removed()
        self._runner.workspaces.release(record.job_id)
        try:
            if not gone:
                raise OSError(errno.EBUSY, "its cgroup is busy")
            await anyio.to_thread.run_sync(self._runner.state.remove, record.job_id)
        except OSError as exc:
            logger.error("cannot remove what is left of job %s, which was not started: %s", record.job_id, exc.strerror)
            return
        self._runner.identities.give_back(record.uid)
