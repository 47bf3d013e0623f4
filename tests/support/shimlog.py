"""A shim's log, read by the shipped reader without a server, and how much of it is on the disk."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

from jobrunner import Gap, JobInfo, JobStatus
from jobrunner.linux.inotify import Inotify
from jobrunner.log import ChunkCache, Log, LogReader
from jobrunner.output import Chunk
from jobrunner.sandbox import ShimHandle
from tests.support.shim import ShimJob
from tests.support.timing import fail_after

__all__ = ["ShimOwner", "collect", "kept_bytes", "open_log"]


class ShimOwner:
    """The job of a shim as its log needs it: it has ended when nobody reads `ctl` (ENXIO, fifo(7))."""

    def __init__(self, job: ShimJob) -> None:
        self.job_id = "0123456789ab"
        self._job = job

    @property
    def ended(self) -> bool:
        try:
            os.close(os.open(self._job.directory / "ctl", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return True
        return False

    def info(self) -> JobInfo:
        status, total = (JobStatus.COMPLETED, self._job.record().log_end) if self.ended else (JobStatus.RUNNING, 0)
        return JobInfo(self.job_id, status, "test", log_end=total)

    async def wait(self) -> JobInfo:
        shim = ShimHandle.open(self._job.directory)
        if shim is not None:
            await shim.gone()
            shim.close()
        return self.info()


@asynccontextmanager
async def open_log(job: ShimJob) -> AsyncIterator[Log]:
    """Who follows it is woken when the job has ended, as a server does: the log may say no more."""
    owner = ShimOwner(job)
    with closing(Inotify()) as inotify:

        async def tell() -> None:
            await owner.wait()
            inotify.wake(str(job.log))

        telling = asyncio.create_task(tell())
        try:
            yield Log(owner, job.log, ChunkCache(), inotify.changed)
        finally:
            telling.cancel()


async def collect(reader: LogReader, seconds: float = 20) -> list[Chunk | Gap]:
    """All that is left for this reader; it is closed then."""
    with fail_after(seconds):
        async with reader:
            return [part async for part in reader]


def kept_bytes(log: Path) -> int:
    """Bytes of all files of a log that is being written, never more than were there at one moment.

    The newest first: it alone grows, and those before it may only go away while we look.
    """
    total = 0
    for name in sorted(os.listdir(log), reverse=True):
        with suppress(FileNotFoundError):
            total += (log / name).stat().st_size
    return total
