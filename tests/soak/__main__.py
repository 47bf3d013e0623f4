"""`python -m tests.soak [--short] [--random-mib N] [ROUND...]`: run these rounds, all by default. Needs root.

followers   32 processes that join, stall, vanish and reconnect, through a proxy that cuts connections: every byte, once
memory      the server's memory while a job writes without end and 100 followers stall
endings     jobs that end the instant after their last write
outage      a server that is dead for long, and jobs whose times are over meanwhile

A round is a function of a fresh directory and `Sizes`; what it returns is printed. Rounds about crashes belong into ROUNDS as well.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

from tests.soak.endings import endings
from tests.soak.followers import followers
from tests.soak.memory import memory
from tests.soak.outage import outage
from tests.soak.sizes import FULL, SHORT, Sizes

Round = Callable[[Path, Sizes], Awaitable[str]]
ROUNDS: Mapping[str, Round] = {"followers": followers, "memory": memory, "endings": endings, "outage": outage}


async def _run(names: list[str], sizes: Sizes) -> None:
    for name in names:
        scratch = Path(tempfile.mkdtemp(prefix=f"soak-{name}-"))
        begun, load = time.monotonic(), os.getloadavg()[0]
        try:
            async with asyncio.timeout(sizes.longest):
                said = await ROUNDS[name](scratch, sizes)
            print(f"{name}: {said}; {time.monotonic() - begun:.0f} s, load average before it {load:.1f}", flush=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Load and abuse for long.")
    parser.add_argument("rounds", nargs="*", metavar="ROUND", help=f"of {', '.join(ROUNDS)}")
    parser.add_argument("--short", action="store_true", help="less of everything, as in CI")
    parser.add_argument("--random-mib", type=int, metavar="N", help="random bytes on both streams, in MiB")
    options = parser.parse_args()
    unknown = set(options.rounds) - set(ROUNDS)
    if unknown:
        parser.error(f"no such round: {', '.join(sorted(unknown))}")
    sizes = SHORT if options.short else FULL
    if options.random_mib is not None:
        sizes = replace(sizes, random_bytes=options.random_mib << 20)
    asyncio.run(_run(options.rounds or list(ROUNDS), sizes))


if __name__ == "__main__":
    main()
