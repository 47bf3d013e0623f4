"""A server of the soak's own, and processes that talk to it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE

import anyio
import anyio.to_thread

from tests.support.daemon import ServerProcess, stop_all

__all__ = ["rss_of", "served", "spawn"]

PAGE = os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def served(directory: Path, settings: str = "") -> AsyncIterator[ServerProcess]:
    """A server with these settings; its jobs are stopped, and it is ended in the end."""
    config = directory / "jobrunnerd.toml"
    config.write_text(settings)
    server = await anyio.to_thread.run_sync(ServerProcess, directory, f"--config={config}")
    try:
        yield server
    finally:
        with anyio.CancelScope(shield=True):
            await stop_all(server)
            await anyio.to_thread.run_sync(server.end)


async def spawn(module: str, server: ServerProcess, address: str, *words: object) -> asyncio.subprocess.Process:
    """`python -m MODULE ADDRESS CA CERT KEY WORD...`, with pipes to and from it."""
    files = [str(server.files()[name]) for name in ("ca", "cert", "key")]
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", module, address, *files, *map(str, words)]
    return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, cwd=root)


def rss_of(pid: int) -> int:
    """Bytes (proc_pid_statm(5))."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
