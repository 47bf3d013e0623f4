"""How long a server takes that is started over a state directory: over many jobs that have ended, and over many that run."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import anyio.to_thread

from tests.bench.limit import at_once
from tests.bench.report import Cell, Part, Sizes
from tests.bench.server import Server, serving
from tests.support.keptjobs import multiply

__all__ = ["restart"]

KIB = 1024


async def restart(scratch: Path, sizes: Sizes) -> Part:
    """From the start of the process to the first answer: nothing there, kept jobs, running jobs. Then the rest of the loading."""
    directory = scratch / "restart"
    async with serving(directory) as (_, client):
        job = await client.start("echo", "hello")
        await job.wait()
    empty, _, empty_rss = await _cold(directory, job.job_id)
    made = await anyio.to_thread.run_sync(multiply, directory / "state", job.job_id, sizes.kept)
    kept, loaded, kept_rss = await _cold(directory, made[-1])
    shutil.rmtree(directory / "state" / "jobs")
    running = await _running(directory, sizes)
    each = (kept_rss - empty_rss) / sizes.kept
    figures = {"kept": sizes.kept, "running": sizes.restarted, "empty_s": empty, "kept_s": kept, "loaded_s": loaded}
    figures |= {"running_s": running, "bytes_per_kept": each}
    rows: list[list[Cell]] = [
        ["first answer, 1 job: ms", empty * 1000],
        [f"first answer, {sizes.kept} ended jobs: ms", kept * 1000],
        ["  complete list of them: ms", loaded * 1000],
        ["  memory for each: KiB", each / KIB],
        [f"first answer, {sizes.restarted} running jobs: ms", running * 1000],
    ]
    return Part("restart", "Restart", ["", ""], rows, figures)


async def _cold(directory: Path, job_id: str) -> tuple[float, float, int]:
    """Seconds from exec to the state of one job, and to the list of all; the memory of the server then."""
    begun = time.monotonic()
    server = await anyio.to_thread.run_sync(Server, directory)
    try:
        async with server.client() as client:
            await client.get(job_id).info()
            answered = time.monotonic() - begun
            await client.list(name="nosuch")
            return answered, time.monotonic() - begun, server.rss
    finally:
        await anyio.to_thread.run_sync(server.end)


async def _running(directory: Path, sizes: Sizes) -> float:
    """Seconds from exec to the state of a job, with so many that run; they are stopped afterwards."""
    server = await anyio.to_thread.run_sync(Server, directory)
    ids: list[str] = []
    async with server.client() as client:

        async def start(_: int) -> None:
            ids.append((await client.start("sleep", "1000")).job_id)

        await at_once(8, sizes.restarted, start)
    await anyio.to_thread.run_sync(server.end, signal.SIGKILL)
    begun = time.monotonic()
    server = await anyio.to_thread.run_sync(Server, directory)
    try:
        async with server.client() as client:
            await client.get(ids[0]).info()
            answered = time.monotonic() - begun
            await at_once(8, len(ids), lambda number: client.get(ids[number]).stop(grace=0))
            return answered
    finally:
        await anyio.to_thread.run_sync(server.end)
