"""Output to many: followers over mutual TLS that read a log, and the way of a line from a job to a follower."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

from jobrunner import JobSpec, Limits
from jobrunner.client import JobClient
from tests.bench.report import Part, Sizes, quantiles
from tests.bench.server import Server, cpu_of

__all__ = ["delay", "fanout"]

MB = 1_000_000
PROCESSES = 4
TICKER = "import os, sys, time\nfor _ in range(int(sys.argv[1])): os.write(1, b'%d\\n' % time.time_ns()); time.sleep(0.005)"
Process = asyncio.subprocess.Process


async def fanout(server: Server, client: JobClient, sizes: Sizes) -> Part:
    """The same log to 1, 8 and 64 followers at once, all of which count; next to asyncio's TLS alone, for a quarter as long."""
    size, plain_size = sizes.log_bytes, sizes.log_bytes // 4
    spec = JobSpec("head", ("-c", str(size), "/dev/zero"), limits=Limits(cpus=2, write_bps=10**10))
    job = await client.start(spec)
    await job.wait()
    files = [str(server.files()[name]) for name in ("ca", "cert", "key")]
    plain = await _spawn("tests.bench.plain", "serve", files[0], *_server_files(server), str(plain_size))
    assert plain.stdout is not None
    plain_address = (await plain.stdout.readline()).decode().strip()
    figures: dict[str, Any] = {"log_bytes": size}
    rows = []
    try:
        for count in sizes.followers:
            of_tls = await _read(plain.pid, count, plain_size, "tests.bench.plain", "read", plain_address, *files)
            found = await _read(server.process.pid, count, size, "tests.bench.follower", server.address, *files, job.job_id)
            ratios = {f"{key}_of_tls": found[key] / of_tls[key] for key in ("mb_per_s", "server_cpu_ms_per_mb")}
            figures[str(count)] = found | ratios
            rows.append([count, *ratios.values(), *found.values()])
    finally:
        plain.kill()
        await plain.communicate()
    header = ["followers", "MB/s / TLS alone", "CPU per MB / TLS alone", "MB/s in all", "server CPU-ms/MB", "server CPU/wall"]
    return Part("fanout", f"Fan-out of a log of {size >> 20} MiB", header, rows, figures)


def _server_files(server: Server) -> Sequence[str]:
    return [str(server.certs / name) for name in ("server.pem", "server.key")]


async def _spawn(*module: str) -> Process:
    root = Path(__file__).parents[2]
    return await asyncio.create_subprocess_exec(sys.executable, "-m", *module, stdin=PIPE, stdout=PIPE, cwd=root, env=os.environ)


async def _read(pid: int, count: int, size: int, *reader: str) -> dict[str, float]:
    """What it takes until the last of them has all; `pid` is the server's."""
    shares = [count // PROCESSES + (number < count % PROCESSES) for number in range(PROCESSES)]
    processes = [await _spawn(*reader, str(share), str(size)) for share in shares if share]
    for process in processes:
        await _expect(process, b"ready\n")
    begun, cpu = time.perf_counter(), cpu_of(pid)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
    for process in processes:
        await _expect(process, b"read\n")
    wall, cpu = time.perf_counter() - begun, cpu_of(pid) - cpu
    for process in processes:
        await process.communicate()
    megabytes = count * size / MB
    return {"mb_per_s": megabytes / wall, "server_cpu_ms_per_mb": max(cpu, 0.01) * 1000 / megabytes, "server_cpu_share": cpu / wall}


async def _expect(process: Process, line: bytes) -> None:
    assert process.stdout is not None
    if (got := await process.stdout.readline()) != line:
        raise RuntimeError(f"a follower says {got!r}, not {line!r}")


async def delay(client: JobClient, sizes: Sizes) -> Part:
    """From before a job's write(2) to after a follower's receipt, both by this host's clock."""
    job = await client.start("/usr/bin/python3", "-c", TICKER, str(sizes.lines))
    taken = []
    async with job.log() as reader:
        while (line := await reader.next_line()) is not None:
            taken.append((time.time_ns() - int(line.data)) / 1e6)
    if len(taken) != sizes.lines:
        raise RuntimeError(f"{len(taken)} of {sizes.lines} lines came")
    found = quantiles(taken)
    return Part("delay", "From a job's write to a follower's receipt, ms", list(found), [list(found.values())], dict(found))
