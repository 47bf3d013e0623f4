"""Output to many: followers over mutual TLS that read a log, and the way of a line from a job to a follower."""

from __future__ import annotations

import asyncio
import sys
import time
from subprocess import PIPE
from typing import Any

from jobrunner import JobSpec, Limits
from jobrunner.client import JobClient
from tests.bench.report import Part, Sizes, quantiles
from tests.bench.server import Server

__all__ = ["delay", "fanout"]

MB = 1_000_000
PROCESSES = 4
TICKER = "import os, sys, time\nfor _ in range(int(sys.argv[1])): os.write(1, b'%d\\n' % time.time_ns()); time.sleep(0.005)"


async def fanout(server: Server, client: JobClient, sizes: Sizes) -> Part:
    """The same log to 1, 8 and 64 followers at once; all of them count."""
    spec = JobSpec("head", ("-c", str(sizes.log_bytes), "/dev/zero"), limits=Limits(cpus=2, write_bps=10**10))
    job = await client.start(spec)
    await job.wait()
    figures: dict[str, Any] = {"log_bytes": sizes.log_bytes}
    rows = []
    for count in sizes.followers:
        wall, cpu = await _read(server, job.job_id, count, sizes.log_bytes)
        megabytes = count * sizes.log_bytes / MB
        found = {"mb_per_s": megabytes / wall, "server_cpu_ms_per_mb": cpu * 1000 / megabytes, "server_cpu_share": cpu / wall}
        figures[str(count)] = found
        rows.append([count, *found.values()])
    header = ["followers", "MB/s in all", "server CPU-ms/MB", "server CPU/wall"]
    return Part("fanout", f"Fan-out of a log of {sizes.log_bytes >> 20} MiB", header, rows, figures)


async def _read(server: Server, job_id: str, count: int, size: int) -> tuple[float, float]:
    """Seconds of wall and of the server's CPU that it takes until the last follower has all."""
    files = server.files()
    shares = [count // PROCESSES + (number < count % PROCESSES) for number in range(PROCESSES)]
    command = [sys.executable, "-m", "tests.bench.follower", server.address, *(str(files[name]) for name in ("ca", "cert", "key"))]
    processes = [
        await asyncio.create_subprocess_exec(*command, job_id, str(share), str(size), stdin=PIPE, stdout=PIPE)
        for share in shares
        if share
    ]
    for process in processes:
        await _expect(process, b"ready\n")
    begun, cpu = time.perf_counter(), server.cpu
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
    for process in processes:
        await _expect(process, b"read\n")
    wall, cpu = time.perf_counter() - begun, server.cpu - cpu
    for process in processes:
        await process.communicate()
    return wall, cpu


async def _expect(process: asyncio.subprocess.Process, line: bytes) -> None:
    assert process.stdout is not None
    if (got := await process.stdout.readline()) != line:
        raise RuntimeError(f"a follower says {got!r}, not {line!r}")


async def delay(client: JobClient, sizes: Sizes) -> Part:
    """From before a job's write(2) to after a follower's receipt, both by this host's clock."""
    job = await client.start(sys.executable, "-c", TICKER, str(sizes.lines))
    taken = []
    async with job.log() as reader:
        while (line := await reader.next_line()) is not None:
            taken.append((time.time_ns() - int(line.data)) / 1e6)
    if len(taken) != sizes.lines:
        raise RuntimeError(f"{len(taken)} of {sizes.lines} lines came")
    found = quantiles(taken)
    return Part("delay", "From a job's write to a follower's receipt, ms", list(found), [list(found.values())], dict(found))
