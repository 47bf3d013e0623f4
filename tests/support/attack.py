"""An attack on a real server, and what is measured while it goes on: the server's memory and descriptors, and an innocent client.

Sizes are those that fit into `make test`; with JOBRUNNER_ATTACK=full they are ten times as large. `-s` shows the figures.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from jobrunner.client import JobClient
from jobrunner.job import Limits
from jobrunner.output import Chunk
from tests.support.daemon import ServerProcess
from tests.support.http2 import RawPeer
from tests.support.timing import fail_after

__all__ = ["FACTOR", "LIMITS", "Figures", "attacked", "tls_peer", "waves"]

FACTOR = 10 if os.environ.get("JOBRUNNER_ATTACK") == "full" else 1
LIMITS = Limits(timeout=120.0 * FACTOR)
"""Of a job: one that is left behind by a run that was cut off ends by itself."""
TICKS = "n=0; while :; do echo $n; n=$((n+1)); sleep 0.05; done"


@dataclass
class Figures:
    """Sizes in bytes, times in seconds. `memory` is before, the peak, and after."""

    memory: tuple[int, int, int] = (0, 0, 0)
    descriptors: tuple[int, int] = (0, 0)
    before: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    fresh: list[float] = field(default_factory=list)
    """Calls of the innocent on a connection of their own."""
    after: list[float] = field(default_factory=list)
    lines: int = 0

    @property
    def grown(self) -> int:
        return self.memory[1] - self.memory[0]

    def __str__(self) -> str:
        rss = " ".join(f"{size / (1 << 20):.1f}" for size in self.memory)
        worst = [f"{1000 * max(times, default=0):.0f}" for times in (self.before, self.during, self.fresh, self.after)]
        middle = 1000 * sorted(self.during)[len(self.during) // 2]
        counts = f"{len(self.during)} calls, {len(self.fresh)} connections, {self.lines} lines"
        calls = (
            f"worst call before {worst[0]} during {worst[1]} (median {middle:.1f}) fresh {worst[2]} after {worst[3]} ms ({counts})"
        )
        return f"RSS {rss} MiB, fds {self.descriptors}, {calls}"


def _memory(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:"))


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def _timed(times: list[float], call: Callable[[], Awaitable[object]]) -> None:
    begun = time.perf_counter()
    await call()
    times.append(time.perf_counter() - begun)


class Innocent:
    """A viewer whose calls must all succeed, and who misses no line of a job's output, whatever the others do."""

    def __init__(self, server: ServerProcess, client: JobClient, job_id: str, figures: Figures) -> None:
        self._server = server
        self._client = client
        self._job_id = job_id
        self._figures = figures
        self.errors: list[BaseException] = []

    def progress(self) -> tuple[int, int, int]:
        return len(self._figures.during), len(self._figures.fresh), self._figures.lines

    async def call(self, times: list[float]) -> None:
        await _timed(times, self._client.get(self._job_id).info)

    async def keep_calling(self) -> None:
        with self._told():
            while True:
                await self.call(self._figures.during)
                await anyio.sleep(0.01)

    async def keep_connecting(self) -> None:
        async def connect() -> None:
            async with self._server.client("viewer") as client:
                await client.server()

        with self._told():
            while True:
                await _timed(self._figures.fresh, connect)
                await anyio.sleep(0.1)

    async def follow(self) -> None:
        with self._told():
            data = b""
            async with self._client.get(self._job_id).log() as output:
                async for part in output:
                    assert isinstance(part, Chunk), part
                    data += part.data
                    *lines, data = data.split(b"\n")
                    for line in lines:
                        assert int(line) == self._figures.lines
                        self._figures.lines += 1

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work()) for work in (self.keep_calling, self.keep_connecting, self.follow)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _told(self) -> suppress:
        outer = self

        class Told(suppress):
            def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> bool:
                if isinstance(exc, Exception):
                    outer.errors.append(exc)
                return isinstance(exc, Exception)

        return Told(Exception)


@asynccontextmanager
async def attacked(server: ServerProcess) -> AsyncIterator[Figures]:
    """What is done inside is an attack. Afterwards: the server lives, the innocent noticed nothing, and nothing is left."""
    pid, figures = server.process.pid, Figures()
    async with server.client("admin") as admin, server.client("viewer") as viewer:
        job = await admin.start("/bin/sh", "-c", TICKS, limits=LIMITS)
        innocent = Innocent(server, viewer, job.job_id, figures)
        for _ in range(20):
            await innocent.call(figures.before)
        descriptors, memory = _descriptors(pid), _memory(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is counted from here on (proc_pid_clear_refs(5))
        async with innocent.at_work():
            yield figures
            seen = innocent.progress()
            with fail_after(20):  # whatever came before, the innocent goes on
                while any(now <= then for now, then in zip(innocent.progress(), seen, strict=True)) and not innocent.errors:  # noqa: ASYNC110
                    await anyio.sleep(0.05)
            with fail_after(20):  # at its own pace: connections that were cut are gone within seconds
                while _descriptors(pid) > descriptors + 3:  # the innocent's own  # noqa: ASYNC110
                    await anyio.sleep(0.05)
        for _ in range(20):
            await innocent.call(figures.after)
        figures.memory = (memory, _memory(pid, "VmHWM"), _memory(pid, "VmRSS"))
        figures.descriptors = (descriptors, _descriptors(pid))
        await job.stop(grace=0)
        print(figures)
        assert server.process.poll() is None
        if innocent.errors:
            pytest.fail(f"an innocent client failed: {innocent.errors}")
        assert max(figures.during + figures.fresh) < 10


@asynccontextmanager
async def tls_peer(server: ServerProcess, user: str = "admin") -> AsyncIterator[RawPeer]:
    """A connection that speaks HTTP/2 by hand; its preface is sent."""
    files = server.files(user)
    context = ssl.create_default_context(cafile=files["ca"])
    context.load_cert_chain(files["cert"], files["key"])
    context.set_alpn_protocols(["h2"])
    host, _, port = server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="localhost")
    try:
        yield await RawPeer(reader, writer).open()
    finally:
        writer.transport.abort()


async def waves(count: int, at_once: int, work: Callable[[int], Awaitable[None]]) -> None:
    """`work(0)` to `work(count - 1)`, so many at once."""
    limiter = anyio.CapacityLimiter(at_once)

    async def one(number: int) -> None:
        async with limiter:
            await work(number)

    async with anyio.create_task_group() as tasks:
        for number in range(count):
            tasks.start_soon(one, number)
