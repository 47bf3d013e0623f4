"""An attack on a real server, and what is measured while it goes on: the server's memory and descriptors, and an innocent client.

Sizes are those that fit into `make test`; with JOBRUNNER_ATTACK=full they are ten times as large. `-s` shows the figures.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from jobrunner.job import Limits
from tests.support.daemon import ServerProcess
from tests.support.http2 import RawPeer
from tests.support.timing import at_most, fail_after

__all__ = ["FACTOR", "LIMITS", "Figures", "Innocent", "attacked", "tls_peer", "waves"]

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


class Innocent:
    """An innocent client in a process of its own (`tests.support.innocent`), and what it tells of one attack at a time."""

    def __init__(self, server: ServerProcess) -> None:
        files = server.files("viewer")
        command = [sys.executable, "-m", "tests.support.innocent", server.address, *map(str, files.values())]
        self.figures = Figures()
        self.errors: list[str] = []
        self._ready = 0
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    async def before(self, job_id: str) -> None:
        self.figures, self.errors = Figures(), []
        await self._until_ready(f"before {job_id}")

    def work(self) -> None:
        self._say("work")

    async def rest(self) -> None:
        await self._until_ready("rest")

    def progress(self) -> tuple[int, int, int]:
        return len(self.figures.during), len(self.figures.fresh), self.figures.lines

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(20) == 0
        self._reader.join()
        self._process.stdout.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    async def _until_ready(self, line: str) -> None:
        seen = self._ready
        self._say(line)
        with fail_after(30):
            while self._ready == seen:
                assert self._process.poll() is None
                await anyio.sleep(0.01)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, _, rest = line.rstrip().partition(" ")
            match word:
                case "before" | "during" | "fresh" | "after":
                    getattr(self.figures, word).append(float(rest))
                case "lines":
                    self.figures.lines = int(rest)
                case "failed":
                    self.errors.append(rest)
                case "ready":
                    self._ready += 1


@asynccontextmanager
async def attacked(server: ServerProcess, innocent: Innocent) -> AsyncIterator[Figures]:
    """What is done inside is an attack. Afterwards: the server lives, the innocent noticed nothing, and nothing is left."""
    pid = server.process.pid
    async with server.client("admin") as admin:
        job = await admin.start("/bin/sh", "-c", TICKS, limits=LIMITS)
        await innocent.before(job.job_id)
        figures = innocent.figures
        descriptors, memory = _descriptors(pid), _memory(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is counted from here on (proc_pid_clear_refs(5))
        innocent.work()
        try:
            yield figures
            seen = innocent.progress()
            with fail_after(20):  # whatever came before, the innocent goes on
                while any(now <= then for now, then in zip(innocent.progress(), seen, strict=True)) and not innocent.errors:  # noqa: ASYNC110
                    await anyio.sleep(0.05)
            with fail_after(20):  # at its own pace: connections that were cut are gone within seconds
                while _descriptors(pid) > descriptors + 3:  # the innocent's own  # noqa: ASYNC110
                    await anyio.sleep(0.05)
        finally:
            with anyio.CancelScope(shield=True):
                await innocent.rest()
        figures.memory = (memory, _memory(pid, "VmHWM"), _memory(pid, "VmRSS"))
        figures.descriptors = (descriptors, _descriptors(pid))
        await job.stop(grace=0)
        print(figures)
        assert server.process.poll() is None
        if innocent.errors:
            pytest.fail(f"an innocent client failed: {innocent.errors}")
        assert max(figures.during + figures.fresh) < at_most(5 if FACTOR == 1 else 10)


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
