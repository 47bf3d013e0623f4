"""The server under measurement, a real process of its own, and what it costs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread

from jobrunner.client import JobClient
from jobrunner.shim import binary_path
from tests.bench.limit import at_once
from tests.support.daemon import ServerProcess

__all__ = ["Server", "cpu_of", "helpers_pss", "pss", "serving"]

TICK = os.sysconf("SC_CLK_TCK")


class Server(ServerProcess):
    """Which knows what it costs."""

    @property
    def rss(self) -> int:
        """Bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[tuple[Server, JobClient]]:
    """A server and a client; its jobs are stopped in the end."""
    directory.mkdir()
    server = Server(directory)
    try:
        async with server.client() as client:
            try:
                yield server, client
            finally:
                with anyio.CancelScope(shield=True):
                    running = [info.job_id for info in await client.list(statuses=["running"])]
                    await at_once(16, len(running), lambda number: client.get(running[number]).stop(grace=0))
    finally:
        await anyio.to_thread.run_sync(server.end)


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has used, to 10 ms (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def pss(pid: int) -> int:
    """Bytes: private memory, and a share of the shared (proc_pid_smaps(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def helpers_pss(job_ids: set[str]) -> list[int]:
    """Of every shim and init of these jobs, found by their program and their cgroup."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.readlink(f"/proc/{entry}/exe") == str(binary_path()):
                words = set(Path(f"/proc/{entry}/cgroup").read_text().replace("/", "\n").split("\n"))
                found += [pss(int(entry))] if words & job_ids else []
        except OSError:  # gone meanwhile
            continue
    return found
