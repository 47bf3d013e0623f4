"""A process of followers: `python -m tests.bench.follower ADDRESS CA CERT KEY JOB COUNT BYTES`.

Each is a client with a connection of its own. Writes `ready`, waits for a line, reads the whole log, and writes `read` if each of
them has got every byte and the end.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack

from jobrunner.client import JobClient
from jobrunner.output import Chunk


async def _follow(client: JobClient, job_id: str, size: int) -> bool:
    got = 0
    async with client.get(job_id).log() as reader:
        async for part in reader:
            got += len(part.data) if isinstance(part, Chunk) else 0
        return got == size and reader.end is not None and reader.end.total_bytes == size


async def _main(address: str, ca: str, cert: str, key: str, job_id: str, count: int, size: int) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(JobClient(address, ca=ca, cert=cert, key=key)) for _ in range(count)]
        for client in clients:
            await client.get(job_id).status()  # connects
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        whole = await asyncio.gather(*(_follow(client, job_id, size) for client in clients))
    print("read" if all(whole) else "bytes are missing", flush=True)


if __name__ == "__main__":
    _, ADDRESS, CA, CERT, KEY, JOB, COUNT, BYTES = sys.argv
    asyncio.run(_main(ADDRESS, CA, CERT, KEY, JOB, int(COUNT), int(BYTES)))
