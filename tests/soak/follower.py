"""One follower: `python -m tests.soak.follower ADDRESS CA CERT KEY JOB SEED STRIDE`.

Joins late, and every STRIDE bytes or earlier stalls for longer than the server waits, loses its connection, or leaves to come back
with a new one at its offset, all at random. Prints one line of JSON when it has the end of the log: bytes of both streams, and how
often it did each of these things. It fails unless each byte came once and in order, and the hashes are those that the job has
written as its last words.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys
from collections import Counter
from typing import Any

from jobrunner.client import JobClient
from jobrunner.job import Stream
from jobrunner.output import Chunk, End

LAST_WORDS = 2 * (64 + 2 + len("stdout") + 1)
"""Bytes of `HASH  stdout` and `HASH  stderr`, a line each, at the end of stdout."""


class Seen:
    """What has come so far."""

    def __init__(self) -> None:
        self.at = 0
        self._hashes = {stream: hashlib.sha256() for stream in Stream}
        self._tail = b""

    def take(self, part: object) -> None:
        assert isinstance(part, Chunk), part
        assert part.offset == self.at, (part, self.at)
        self.at = part.next_offset
        data = part.data
        if part.stream is Stream.STDOUT:
            data = self._tail + data
            data, self._tail = data[:-LAST_WORDS], data[-LAST_WORDS:]
        self._hashes[part.stream].update(data)

    def check(self, end: End) -> None:
        expected = sorted(f"{hashed.hexdigest()}  {stream}" for stream, hashed in self._hashes.items())
        assert sorted(self._tail.decode().splitlines()) == expected
        assert end.total_bytes == self.at


async def _some(client: JobClient, job_id: str, seen: Seen, chance: random.Random, stride: int, did: Counter[str]) -> End | None:
    """Follow until the end, or until it is time to leave."""
    async with client.get(job_id).log(offset=seen.at) as reader:
        until = seen.at
        async for part in reader:
            seen.take(part)
            if seen.at < until:
                continue
            if until and (what := chance.choice(["stall", "lose", "leave", "nothing"])) != "nothing":
                did[what] += 1
                if what == "leave":
                    return None
                if what == "stall":
                    await asyncio.sleep(chance.uniform(0.1, 2))
                elif client._channel.last is not None and client._channel.last.transport is not None:
                    client._channel.last.transport.abort()
            until = seen.at + chance.randint(1 << 14, stride)
        return reader.end


async def _main(address: str, files: dict[str, Any], job_id: str, seed: int, stride: int) -> None:
    chance, did, seen = random.Random(seed), Counter[str](), Seen()
    await asyncio.sleep(chance.uniform(0, 3))
    end = None
    while end is None:
        async with JobClient(address, **files) as client:
            end = await _some(client, job_id, seen, chance, stride, did)
    seen.check(end)
    print(json.dumps({"bytes": seen.at, **did}), flush=True)


if __name__ == "__main__":
    _, ADDRESS, CA, CERT, KEY, JOB, SEED, STRIDE = sys.argv
    asyncio.run(_main(ADDRESS, {"ca": CA, "cert": CERT, "key": KEY}, JOB, int(SEED), int(STRIDE)))
