"""Followers of one job through a proxy that cuts connections: each has every byte of both streams, once and in order."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path

import anyio

from jobrunner import Limits
from tests.soak.follower import LAST_WORDS
from tests.soak.serving import served, spawn
from tests.soak.sizes import Sizes
from tests.support.daemon import ServerProcess
from tests.support.proxy import proxy_to

__all__ = ["followers"]

SCRIPT = """
exec 3>&1 4>&2
words=$(
    { { seq -f 'line %%.0f' 1 %d; head -c %d /dev/urandom; } | tee /dev/fd/3 | sha256sum | sed 's/-$/stdout/'; } &
    head -c %d /dev/urandom | tee /dev/fd/4 | sha256sum | sed 's/-$/stderr/'
    wait
)
printf '%%s\\n' "$words"
"""
SETTINGS = "send_timeout = 1\n"
"""Less than followers stall for."""
GHOSTS = 2
"""Processes at any time that follow and are killed in the middle of it."""


async def followers(directory: Path, sizes: Sizes) -> str:
    half = sizes.random_bytes // 2
    expected = lines_size(sizes.lines) + 2 * half + LAST_WORDS
    chance = random.Random(32)
    async with (
        served(directory, SETTINGS) as server,
        server.client() as client,
        proxy_to(server.address, lambda: chance.choice([None, chance.randint(1 << 14, expected // 3)])) as proxy,
    ):
        script = SCRIPT % (sizes.lines, half, half)
        job = await client.start("sh", "-c", script, limits=Limits(cpus=2, output_limit=8 << 30))
        processes = [
            await spawn("tests.soak.follower", server, proxy.address, job.job_id, seed, expected // 3)
            for seed in range(sizes.followers)
        ]
        killed = [0] * GHOSTS
        try:
            async with anyio.create_task_group() as ghosts:
                for number in range(GHOSTS):
                    ghosts.start_soon(_ghosts, server, proxy.address, job.job_id, chance, killed, number)
                said = await asyncio.gather(*(process.communicate() for process in processes))
                ghosts.cancel_scope.cancel()
        finally:
            for process in processes:
                if process.returncode is None:
                    process.kill()
        info = await job.wait()
    did: Counter[str] = Counter()
    for process, (out, _) in zip(processes, said, strict=True):
        said_by_server = server.log[-2000:].decode(errors="replace")
        assert process.returncode == 0, f"a follower failed: {out.decode()}; the server says:\n{said_by_server}"
        found = json.loads(out)
        assert found.pop("bytes") == info.log_end == expected
        did.update(found)
    times = ", ".join(f"{what} {count}" for what, count in sorted(did.items()))
    return f"{sizes.followers} followers have {expected} bytes each ({times}; connections cut {proxy.cuts}, killed {sum(killed)})"


def lines_size(count: int) -> int:
    """Bytes of `line 1` to `line COUNT`, each with its newline."""
    powers = [10**digits for digits in range(len(str(count)))]
    return sum(len(f"line {power}\n") * (min(10 * power, count + 1) - power) for power in powers)


async def _ghosts(server: ServerProcess, address: str, job_id: str, chance: random.Random, killed: list[int], number: int) -> None:
    while True:
        process = await spawn("tests.soak.follower", server, address, job_id, chance.getrandbits(32), 1 << 24)
        try:
            await anyio.sleep(chance.uniform(0.5, 8))
        finally:
            if process.returncode is None:
                process.kill()
            with anyio.CancelScope(shield=True):
                await process.communicate()
        killed[number] += 1
