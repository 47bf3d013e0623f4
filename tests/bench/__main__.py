"""`python -m tests.bench [--smoke] [--out FILE]`: measure, print the tables, and keep the figures as JSON. Needs root and bwrap."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from jobrunner.config import RunnerConfig
from jobrunner.errors import JobRunnerError
from jobrunner.runner import JobRunner
from tests.bench.fanout import delay, fanout
from tests.bench.isolation import isolation
from tests.bench.logwrite import log_writing
from tests.bench.machine import describe
from tests.bench.memory import memory
from tests.bench.report import Part, Sizes, show
from tests.bench.restart import restart
from tests.bench.server import serving
from tests.bench.starts import latency, rates

SMOKE = Sizes(
    rounds=5,
    jobs=16,
    sleepers=4,
    log_bytes=2 << 20,
    followers=(1, 8),
    lines=20,
    flood_bytes=8 << 20,
    single_bytes=10_000,
    floods=1,
    kept=50,
    restarted=4,
)


async def _parts(runner: JobRunner, scratch: Path, sizes: Sizes) -> AsyncIterator[Part]:
    async with serving(scratch / "server") as (server, client):
        yield await latency(runner, client, scratch, sizes)
        yield await delay(client, sizes)
    yield await isolation(runner, scratch, sizes)
    async with serving(scratch / "fresh") as (server, client):  # one whose memory is not yet that of a thousand jobs
        yield await memory(server, client, sizes)
        yield await rates(runner, client, sizes)
        yield await fanout(server, client, sizes)
    yield await log_writing(runner, sizes)
    yield await restart(scratch, sizes)


async def _main(out: Path, sizes: Sizes) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=out.parent.absolute()))
    begun = time.monotonic()
    try:
        async with JobRunner.open(RunnerConfig(state_dir=scratch / "state")) as runner:
            found: dict[str, Any] = {"machine": describe(scratch, runner.cgroup_version)}
            print(", ".join(f"{key} {value}" for key, value in found["machine"].items()), end="\n\n")
            async for part in _parts(runner, scratch, sizes):
                found[part.name] = part.figures
                print(show(part), flush=True)
        found["seconds"] = time.monotonic() - begun
        out.write_text(json.dumps(found, indent=2) + "\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="little of each: whether it works, not how fast")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    options = parser.parse_args()
    if shutil.which("bwrap") is None:
        print("cannot compare: bwrap is not there; apt-get install bubblewrap", file=sys.stderr)
        return 1
    if sys.version_info < (3, 12):
        asyncio.get_event_loop_policy().set_child_watcher(asyncio.PidfdChildWatcher())
    try:
        asyncio.run(_main(options.out, SMOKE if options.smoke else Sizes()))
    except JobRunnerError as exc:
        print(exc.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
