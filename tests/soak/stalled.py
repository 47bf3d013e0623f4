"""Followers that come, read and stall: `python -m tests.soak.stalled ADDRESS CA CERT KEY JOB COUNT BYTES`.

Each has a connection of its own, and reads at least this much. Then it says `ready`, and reads nothing any more.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack

from jobrunner.client import JobClient
from jobrunner.output import Chunk, OutputReader


async def _read(reader: OutputReader, size: int) -> None:
    got = 0
    while got < size:
        part = await anext(reader)
        got += len(part.data) if isinstance(part, Chunk) else 0


async def _main(address: str, ca: str, cert: str, key: str, job_id: str, count: int, size: int) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(JobClient(address, ca=ca, cert=cert, key=key)) for _ in range(count)]
        for client in clients:
            await client.get(job_id).status()  # connects, one after the other: a server bounds handshakes
        readers = [await stack.enter_async_context(client.get(job_id).log()) for client in clients]
        await asyncio.gather(*(_read(reader, size) for reader in readers))
        print("ready", flush=True)
        sys.stdin.readline()  # which blocks the loop: nothing is read from the sockets either


if __name__ == "__main__":
    _, ADDRESS, CA, CERT, KEY, JOB, COUNT, BYTES = sys.argv
    asyncio.run(_main(ADDRESS, CA, CERT, KEY, JOB, int(COUNT), int(BYTES)))
