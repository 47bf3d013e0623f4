"""Which jobs there are, and their request ids: in memory the running ones, and of those that have ended no more than an entry.

The record of a job that has ended is read from its directory when somebody asks for it, and held for no longer than he does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Collection
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import anyio.to_thread

from jobrunner import recovery
from jobrunner.errors import HostError, JobNotFound, JobRemoved
from jobrunner.kept import Entry, Jobs, hash_labels
from jobrunner.requests import RequestIds, request_key

if TYPE_CHECKING:
    from jobrunner.handle import RunnerJob
    from jobrunner.recovery import Left
    from jobrunner.runner import JobRunner

__all__ = ["Catalog"]

logger = logging.getLogger(__name__)


class Catalog:
    """The jobs of one runner."""

    def __init__(self, runner: JobRunner) -> None:
        self.jobs = Jobs()
        self.requests = RequestIds(runner.state.path / "requests")
        self.loaded = asyncio.Event()
        """Every job that the state directory has is known, and every request id."""
        self._runner = runner
        self._handles: WeakValueDictionary[str, RunnerJob] = WeakValueDictionary()
        self._unloaded: set[str] = set()

    def __repr__(self) -> str:
        return f"<Catalog {self.jobs!r}, {len(self._unloaded)} not loaded>"

    def expect(self, ended: list[str]) -> None:
        """There are these jobs besides, which have ended. From here on each is loaded when it is asked for."""
        self._unloaded.update(ended)

    async def load(self, ended: list[str]) -> None:
        """Load them all."""
        try:
            await recovery.load_rest(self._runner, ended)
        finally:
            self.loaded.set()  # also when the runner is closed meanwhile, which then takes no new jobs

    def add(self, job: RunnerJob) -> None:
        """A job that runs."""
        self._handles[job.job_id] = job
        self.jobs.add(self._entry(job))

    def forget(self, job_id: str) -> None:
        """The job turned out never to have run."""
        self._handles.pop(job_id, None)
        entry = self.jobs.remove(job_id)
        if entry is not None:
            self.requests.forget(entry.request, job_id)

    def is_unloaded(self, job_id: str) -> bool:
        """Whether this is a job of which nothing but the id is known yet."""
        return job_id in self._unloaded

    def is_read(self, job_id: str) -> bool:
        """Whether somebody reads this job's output."""
        job = self._handles.get(job_id)
        return job is not None and job.is_read

    async def get(self, job_id: str) -> RunnerJob:
        """The job of this id. Raises JobNotFound; HostError if its record cannot be read now."""
        job = self._handles.get(job_id)
        if job is None and (job_id in self.jobs or job_id in self._unloaded):
            try:
                found = await anyio.to_thread.run_sync(recovery.load_one, self._runner, job_id)
            except OSError as exc:
                raise HostError(f"cannot read job {job_id}: {exc.strerror}") from exc
            if found is None:  # what it turned out to be was told, and set aside or removed
                self._unloaded.discard(job_id)
                self.jobs.remove(job_id)
            else:
                job = self.take_ended(*found)
        if job is None:
            raise JobNotFound(job_id)
        return job

    async def started(self, request_id: str, job_id: str) -> RunnerJob:
        try:
            return await self.get(job_id)
        except JobNotFound as exc:
            raise JobRemoved(request_id, job_id) from exc

    async def drop(self, job_ids: Collection[str]) -> None:
        """Remove these ended jobs. Their request ids outlive them. Raises HostError; those that are still there then are kept."""
        now = time.time()
        entries = [entry for job_id in job_ids if (entry := self.jobs.remove(job_id)) is not None]
        for entry in entries:
            self._handles.pop(entry.job_id, None)
        await self._runner.finish(self._drop(entries, now))

    async def _drop(self, entries: list[Entry], now: float) -> None:
        try:
            await anyio.to_thread.run_sync(self._drop_now, entries, now, limiter=self._runner.walks)
        except OSError as exc:
            there = [entry for entry in entries if os.path.lexists(self._runner.state.directory(entry.job_id))]
            for entry in there:
                self.jobs.add(entry)
            entries = [entry for entry in entries if entry not in there]
            if there:
                what = f"job {there[0].job_id}" if len(there) == 1 else f"{len(there)} jobs"
                raise HostError(f"cannot remove {what}: {exc.strerror}") from exc
            logger.error("removed jobs may be there again after a power loss: %s", exc.strerror)
        finally:
            self.requests.outlive([entry.request for entry in entries if entry.request], now)

    def _drop_now(self, entries: Collection[Entry], now: float) -> None:
        job_ids = [entry.job_id for entry in entries]
        keys = [entry.request for entry in entries if entry.request]
        # Order: the request ids first, or a crash in between would let a start that is asked for again happen twice.
        try:
            self.requests.append(keys, now)
        except OSError:  # a full disk must not keep a job
            self._runner.state.remove(*job_ids)
            try:
                self.requests.append(keys, now)
            except OSError as exc:
                logger.error("cannot keep request ids of %d removed jobs over a restart: %s", len(keys), exc.strerror)
        else:
            self._runner.state.remove(*job_ids)

    def take_ended(self, job: RunnerJob, left: Left) -> RunnerJob:
        """Take a job that was settled before; the one that is here already, if it was read twice at a time."""
        if job.job_id in self._handles:
            return self._handles[job.job_id]
        if job.job_id in self._unloaded:
            self._unloaded.discard(job.job_id)
            self.jobs.add(self._entry(job))
            self.jobs.end(job.job_id, left.ending().status, left.ending().ended, left.size)
        if job.job_id not in self.jobs:  # removed while it was read
            raise JobNotFound(job.job_id)
        self._handles[job.job_id] = job
        job.mark_ended(left.ending(), left.bounds)
        return job

    def _entry(self, job: RunnerJob) -> Entry:
        record, spec = job.record, job.record.spec
        key = request_key(record.user, spec.request_id) if spec.request_id else b""
        if key:
            self.requests.remember(key, record.fingerprint, job.job_id)
        return Entry(job.job_id, record.created, spec.name, hash_labels(spec.labels), key)
