"""How long ended jobs are kept: by count, by age, by bytes on disk; the oldest goes first, and none that is being read.

One task, beside everything else: it is woken by each end, and looks at the clock once in a while for the age.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from jobrunner.errors import HostError

if TYPE_CHECKING:
    from jobrunner.runner import JobRunner

__all__ = ["Retention"]

logger = logging.getLogger(__name__)

BATCH = 64
"""Jobs that are removed at once: some syncs of the disk for all of them together."""
LOOK = 30.0
"""Seconds between two looks: for ages, and for jobs that were being read before."""


class Retention:
    """The retention of one runner's jobs."""

    def __init__(self, runner: JobRunner) -> None:
        self._runner = runner
        self._ended = asyncio.Event()

    def wake(self) -> None:
        """A job has ended."""
        self._ended.set()

    async def run(self) -> None:
        """For ever; all jobs must be known."""
        while True:
            self._ended.clear()
            while victims := self.victims(time.time()):
                try:
                    await self._runner.catalog.drop(victims)
                except HostError as exc:
                    logger.error("%s", exc.message)
                    break
                logger.info("removed %d ended jobs, to keep to keep_jobs, keep_age and keep_bytes", len(victims))
            try:
                async with asyncio.timeout(LOOK):
                    await self._ended.wait()
            except TimeoutError:
                continue

    def victims(self, now: float) -> list[str]:
        """Ids of jobs to remove now, a batch at most."""
        config, jobs = self._runner.config, self._runner.catalog.jobs
        count, size = jobs.ended, jobs.size
        found: list[str] = []
        for entry in jobs.first_ended():
            too_many = config.keep_jobs is not None and count > config.keep_jobs
            too_old = config.keep_age is not None and entry.ended < now - config.keep_age
            too_large = config.keep_bytes is not None and size > config.keep_bytes
            if not (too_many or too_old or too_large) or len(found) == BATCH:
                break
            if not self._runner.catalog.is_read(entry.job_id):
                found.append(entry.job_id)
                count, size = count - 1, size - entry.size
        return found
