"""An innocent client, in a process of its own: what it notices is the server's doing, not its attackers' load on a common loop.

`python -m tests.support.innocent ADDRESS CA CERT KEY`. Lines on standard input tell it what to do, and it tells by lines:

    before JOB    calls, `before SECONDS` for each, and `ready`
    work          calls, connections of their own and the job's output, all the time: `during SECONDS`, `fresh SECONDS`, `lines N`
    rest          stops that, calls again, `after SECONDS`, and `ready`
    failed TEXT   what it has told: something that no attack excuses

It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from jobrunner.client import JobClient
from jobrunner.output import Chunk

CALLS = 20


def tell(*words: object) -> None:
    print(*words, flush=True)


async def timed(word: str, call: Callable[[], Awaitable[object]]) -> None:
    begun = time.perf_counter()
    await call()
    tell(word, time.perf_counter() - begun)


class Innocent:
    """A viewer whose calls must all succeed, and who misses no line of a job's output, whatever the others do."""

    def __init__(self, make: Callable[[], JobClient]) -> None:
        self._make = make
        self._job = ""
        self._client: JobClient | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def obey(self, line: str) -> None:
        match line.split():
            case ["before", job]:
                self._job, self._client = job, await self._make().__aenter__()
                await self._calls("before")
            case ["work"]:
                self._tasks = [asyncio.create_task(self._told(work)) for work in (self._call, self._connect, self._follow)]
            case ["rest"]:
                for task in self._tasks:
                    task.cancel()
                await asyncio.wait(self._tasks)
                await self._calls("after")
                assert self._client is not None
                await self._client.__aexit__()

    async def _calls(self, word: str) -> None:
        for _ in range(CALLS):
            await timed(word, self._info)
        tell("ready")

    async def _info(self) -> Any:
        assert self._client is not None
        return await self._client.get(self._job).info()

    async def _call(self) -> None:
        while True:
            await timed("during", self._info)
            await asyncio.sleep(0.01)

    async def _connect(self) -> None:
        async def connect() -> None:
            async with self._make() as client:
                await client.server()

        while True:
            await timed("fresh", connect)
            await asyncio.sleep(0.1)

    async def _follow(self) -> None:
        data, count = b"", 0
        assert self._client is not None
        async with self._client.get(self._job).log() as output:
            async for part in output:
                assert isinstance(part, Chunk), part
                data += part.data
                *lines, data = data.split(b"\n")
                for line in lines:
                    assert int(line) == count
                    count += 1
                tell("lines", count)

    async def _told(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as exc:
            tell("failed", repr(exc))


async def main() -> None:
    address, ca, cert, key = sys.argv[1:]
    innocent = Innocent(lambda: JobClient(address, ca=ca, cert=cert, key=key))
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        await innocent.obey(line)


if __name__ == "__main__":
    asyncio.run(main())
