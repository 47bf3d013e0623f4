"""How long a start takes, next to what it is made of: the shim alone, bubblewrap, a bare spawn. One of each in turn."""

from __future__ import annotations

import asyncio
import os
import select
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from jobrunner import JobSpec
from jobrunner.client import JobClient
from jobrunner.runner import JobRunner
from jobrunner.shim import binary_path
from jobrunner.shim.launch import LaunchPlan, pack_plan
from tests.bench.limit import at_once
from tests.bench.report import Cell, Part, Sizes, quantiles

__all__ = ["latency", "launched", "rates"]

TRUE = "/bin/true"
BWRAP = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", TRUE]
Timed = tuple[float, float]
"""Milliseconds until the command was executed, and until all was over."""


async def latency(runner: JobRunner, client: JobClient, scratch: Path, sizes: Sizes) -> Part:
    """Starts of /bin/true; bubblewrap does not tell when it has executed it."""
    kinds: Mapping[str, Callable[[int], Timed | Awaitable[Timed]]] = {
        "bare spawn": lambda _: _bare(),
        "bwrap --unshare-all": lambda _: _bwrap(),
        "shim alone": lambda number: _shim(scratch / f"shim-{number}"),
        "library": lambda _: _library(runner),
        "mTLS gRPC": lambda _: _grpc(client),
    }
    times: dict[str, list[Timed]] = {kind: [] for kind in kinds}
    for number in range(-5, sizes.rounds):
        for kind, run in kinds.items():
            taken = run(number)  # nothing else is under way: what blocks may block
            taken = taken if isinstance(taken, tuple) else await taken
            if number >= 0:
                times[kind].append(taken)
    figures: dict[str, dict[str, float]] = {}
    rows: list[list[Cell]] = []
    for what, column in (("started", 0), ("ended", 1)):
        base = {kind: statistics.median(one[column] for one in times[kind]) for kind in kinds}
        for kind in kinds:
            if what == "started" and kind.startswith("bwrap"):
                continue
            found = quantiles([one[column] for one in times[kind]])
            of = {"of_shim": base[kind] / base["shim alone"]}
            if what == "ended":
                of["of_bwrap"] = base[kind] / base["bwrap --unshare-all"]
            figures[f"{kind}, {what}"] = found | of
            rows.append([what, kind, *found.values(), of["of_shim"], of.get("of_bwrap", "-")])
    return Part("start_latency", "Start latency, ms", ["until", "", "p50", "p90", "p99", "/ shim alone", "/ bwrap"], rows, figures)


async def rates(runner: JobRunner, client: JobClient, sizes: Sizes) -> Part:
    """Jobs a second, from the request to the end of all of it."""
    spawned = [TRUE]
    kinds: Mapping[str, Callable[[int], Awaitable[object]]] = {
        "bare spawn": lambda _: _spawned(spawned),
        "bwrap --unshare-all": lambda _: _spawned(BWRAP),
        "library": lambda _: _library(runner),
        "mTLS gRPC": lambda _: _grpc(client),
    }
    found: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    in_flight = (1, 16, 64)
    for most in in_flight:
        for kind, run in kinds.items():
            begun = time.perf_counter()
            await at_once(most, sizes.jobs, run)
            found[kind][str(most)] = sizes.jobs / (time.perf_counter() - begun)
    rows: list[list[Cell]] = [
        [kind, *per.values(), *(value / found["bwrap --unshare-all"][most] for most, value in per.items())]
        for kind, per in found.items()
    ]
    header = ["", *(f"{most} in flight" for most in in_flight), *(f"/ bwrap, {most}" for most in in_flight)]
    return Part("rates", "Jobs a second", header, rows, dict(found))


def _since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000


def _bare() -> Timed:
    begun = time.perf_counter()
    process = subprocess.Popen([TRUE], stdin=subprocess.DEVNULL)
    started = _since(begun)
    process.wait()
    return started, _since(begun)


def _bwrap() -> Timed:
    begun = time.perf_counter()
    subprocess.run(BWRAP, stdin=subprocess.DEVNULL, check=True)
    return _since(begun), _since(begun)


async def _spawned(command: list[str]) -> None:
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL)
    await process.wait()


def _shim(directory: Path) -> Timed:
    """Without cgroups, in a directory that was made before."""
    (directory / "log").mkdir(parents=True)
    return launched(LaunchPlan(directory=str(directory), command=[TRUE], env={}, hostname="bench"))


def launched(plan: LaunchPlan) -> Timed:
    """The helper as the library calls it."""
    items = os.memfd_create("bench")
    begun = time.perf_counter()
    os.write(items, pack_plan(plan))
    done = subprocess.run([binary_path()], stdin=items, capture_output=True, check=False, env={}, start_new_session=True)
    started = _since(begun)
    if done.stdout != b"started\n":
        raise RuntimeError(f"the shim did not start: {done.stdout!r}")
    try:
        ctl = os.open(Path(plan.directory, "ctl"), os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # ENXIO: it is gone already (fifo(7))
        ctl = -1
    if ctl >= 0:
        poll = select.poll()
        poll.register(ctl, 0)
        poll.poll(10_000)
        os.close(ctl)
    os.close(items)
    return started, _since(begun)


async def _library(runner: JobRunner) -> Timed:
    begun = time.perf_counter()
    job = await runner.start(JobSpec(TRUE))
    started = _since(begun)
    await job.wait()
    return started, _since(begun)


async def _grpc(client: JobClient) -> Timed:
    begun = time.perf_counter()
    job = await client.start(TRUE)
    started = _since(begun)
    await job.wait()
    return started, _since(begun)
