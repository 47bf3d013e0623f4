"""The server's memory while a job writes and its followers do not read."""

from __future__ import annotations

import asyncio
from pathlib import Path

from jobrunner import JobInfo, Limits
from jobrunner.client import JobClient
from tests.soak.serving import rss_of, served, spawn
from tests.soak.sizes import Sizes
from tests.support.daemon import ServerProcess

__all__ = ["memory"]

MIB = 1 << 20
PROCESSES = 4
LITTLE = 1 << 20
"""Bytes that each reads before it stalls."""
BEFORE = 16 * MIB
SCRIPT = f"trap : TERM; head -c {BEFORE} /dev/zero; sleep 3600 & wait; head -c {{}} /dev/zero"
"""The stop signal is what tells the job that its followers have stalled."""
GROWTH, IN_ALL = 8 * MIB, 32 * MIB
"""Goals: since the followers have stalled, and since before they came."""


async def memory(directory: Path, sizes: Sizes) -> str:
    async with served(directory) as server, server.client() as client:
        await _warm(client)
        before = rss_of(server.process.pid)
        limits = Limits(cpus=2, output_limit=64 * MIB, write_bps=10**10)
        job = await client.start("sh", "-c", SCRIPT.format(sizes.flood_bytes), limits=limits)
        processes = [
            await spawn("tests.soak.stalled", server, server.address, job.job_id, sizes.stalled // PROCESSES, LITTLE)
            for _ in range(PROCESSES)
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                assert await process.stdout.readline() == b"ready\n"
            at_stall = rss_of(server.process.pid)
            peak = await _peak(server, asyncio.create_task(job.stop(grace=3600)))
        finally:
            for process in processes:
                process.kill()
                await process.communicate()
        assert (await job.info()).log_end == BEFORE + sizes.flood_bytes
    grown, in_all = peak - at_stall, peak - before
    said = (
        f"{sizes.stalled} followers stalled while a job wrote {sizes.flood_bytes >> 20} MiB: the server grew by "
        f"{grown / MIB:.1f} MiB from then on, and by {in_all / MIB:.1f} MiB since before they came"
    )
    assert grown < GROWTH and in_all < IN_ALL, said
    return said


async def _warm(client: JobClient) -> None:
    """What the first reader of a server costs is not a reader's cost."""
    job = await client.start("head", "-c", str(32 * MIB), "/dev/zero")
    async with job.log() as reader:
        async for _ in reader:
            pass


async def _peak(server: ServerProcess, ended: asyncio.Task[JobInfo]) -> int:
    """The most that the server has until the job has ended."""
    most = 0
    while not ended.done():
        most = max(most, rss_of(server.process.pid))
        await asyncio.wait([ended], timeout=0.05)
    await ended
    return max(most, rss_of(server.process.pid))
