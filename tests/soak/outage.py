"""A server that is dead for long: its jobs run and log on, and their times hold, to be told by the server that comes after it."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from pathlib import Path

import anyio.to_thread

from jobrunner import Gap, JobInfo, Limits
from jobrunner.client import ClientJob, JobClient
from jobrunner.output import Chunk
from tests.soak.serving import served
from tests.soak.sizes import Sizes
from tests.support.daemon import ServerProcess
from tests.support.timing import at_most

__all__ = ["outage"]

MIB = 1 << 20
TICK = "mkfifo tick; exec 3<>tick; tick() { read -t $1 -u 3; return 0; }; "
"""What sleeps without a process of its own; needs bash."""
LINES = f"{TICK}i=0; while :; do echo $i; i=$((i + 1)); tick 0.01; done"
WIDTH = 16
FIRST = 10**14
"""A burst is of numbers of 15 digits, each in a line, so that each byte tells its offset."""
BURSTS = f"{TICK}i={FIRST}; while :; do seq $i $((i + LINES - 1)); i=$((i + LINES)); tick EVERY; done"
LATE = 0.1
"""Seconds by which a job may outlast its time."""


async def outage(directory: Path, sizes: Sizes) -> str:
    long = sizes.outage
    server = await anyio.to_thread.run_sync(ServerProcess, directory)
    async with server.client() as client:
        jobs, asked = await _started(client, sizes)
    await anyio.to_thread.run_sync(server.end, signal.SIGKILL)
    await asyncio.sleep(long)
    async with served(directory) as again, again.client() as client:
        found = {name: client.get(job.job_id) for name, job in jobs.items()}
        late = {name: await _late(found[name], name, long, asked) for name in ENDS}
        assert (await found["own end"].wait()).exit_code == 7
        lines, pause = await _numbered(found["lines"])
        kept, told = await _bursts(found["bursts"])
    assert all(-0.01 < seconds < at_most(LATE) for seconds in late.values()), late
    ends = ", ".join(f"{name} {seconds * 1000:.1f}" for name, seconds in late.items())
    return (
        f"the server was dead for {long:.0f} s: {lines} numbered lines without a hole, {pause * 1000:.0f} ms between two at most; "
        f"bursts of {kept + told >> 20} MiB, {kept >> 20} of them kept and the rest told; ms late: {ends}"
    )


ENDS = ("deadline", "idle_timeout", "output_limit", "stopped")


async def _started(client: JobClient, sizes: Sizes) -> tuple[dict[str, ClientJob], float]:
    """The jobs, and when the one of them was stopped that takes no notice of it."""
    long = sizes.outage
    burst = BURSTS.replace("LINES", str(sizes.burst // WIDTH)).replace("EVERY", str(long / 35))
    silent = f"{TICK}for i in $(seq {int(0.3 * long)}); do echo $i; tick 1; done; exec sleep {10 * long}"
    scripts = {
        "lines": (LINES, Limits()),
        "bursts": (burst, Limits(output_limit=sizes.burst // 2)),
        "deadline": (f"exec sleep {10 * long}", Limits(timeout=0.7 * long)),
        "idle_timeout": (silent, Limits(idle_timeout=0.2 * long)),
        "output_limit": (
            f"sleep {0.6 * long}; head -c {MIB} /dev/zero; exec sleep {10 * long}",
            Limits(output_limit=MIB // 4, output_policy="stop"),  # type: ignore[arg-type]
        ),
        "stopped": ("trap 'echo asked' TERM; echo up; while :; do sleep 0.1; done", Limits()),
        "own end": (f"sleep {0.8 * long}; exit 7", Limits()),
    }
    jobs = {name: await client.start("bash", "-c", script, limits=limits) for name, (script, limits) in scripts.items()}
    async with jobs["stopped"].log() as output:
        await output.next_line()
        asked = time.time()
        stop = asyncio.create_task(jobs["stopped"].stop(grace=0.5 * long))
        await output.next_line()
        stop.cancel()
        await asyncio.wait([stop])
    return jobs, asked


async def _late(job: ClientJob, name: str, long: float, asked: float) -> float:
    """Seconds by which a job's end came after its time."""
    info = await job.wait()
    assert info.end_reason == name, info
    assert info.ended is not None and info.usage.wall is not None
    match name:
        case "deadline":
            return info.usage.wall - 0.7 * long
        case "stopped":
            return info.ended - asked - 0.5 * long
        case "idle_timeout":
            return info.ended - await _last_time(job) - 0.2 * long
        case _:
            return info.ended - await _last_time(job)


async def _last_time(job: ClientJob) -> float:
    async with job.log(exact_times=True) as reader:
        return [part.time async for part in reader if isinstance(part, Chunk)][-1]


async def _numbered(job: ClientJob) -> tuple[int, float]:
    """How many lines there are without a hole, and the longest time between two reads of them."""
    info = await job.stop(grace=0)
    data, times = await _all(job)
    assert info.log_end == len(data)
    numbers = data.decode().splitlines()
    assert numbers == [str(number) for number in range(len(numbers))]
    return len(numbers), max(after - before for before, after in itertools.pairwise(times))


async def _all(job: ClientJob) -> tuple[bytes, list[float]]:
    data, times = bytearray(), []
    async with job.log(exact_times=True) as reader:
        async for part in reader:
            assert isinstance(part, Chunk) and part.offset == len(data)
            data += part.data
            times.append(part.time)
    return bytes(data), times


async def _bursts(job: ClientJob) -> tuple[int, int]:
    """Bytes that are there, and right, and bytes that a gap tells."""
    info: JobInfo = await job.stop(grace=0)
    kept, told, at = bytearray(), 0, 0
    async with job.log() as reader:
        async for part in reader:
            if isinstance(part, Gap):
                assert (part.first, at, len(kept)) == (0, 0, 0), part
                told = at = part.last + 1
            else:
                assert part.offset == at
                kept += part.data
                at = part.next_offset
    assert at == info.log_end
    first = told // WIDTH
    text = b"".join(b"%d\n" % (FIRST + first + number) for number in range(len(kept) // WIDTH + 2))
    begin = told % WIDTH
    assert kept == text[begin : begin + len(kept)]
    return len(kept), told
