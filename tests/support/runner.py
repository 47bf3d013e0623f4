"""A real JobRunner on a fresh state directory, and what to look at around it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from jobrunner import JobInfo, JobSpec, Stream
from jobrunner.config import RunnerConfig
from jobrunner.output import Chunk
from jobrunner.runner import JobRunner, RunnerJob
from tests.support.timing import fail_after


@asynccontextmanager
async def open_runner(path: Path, **config: Any) -> AsyncIterator[JobRunner]:
    """Jobs that still run when the test is over are stopped, so that a failing test leaves nothing either."""
    async with JobRunner.open(RunnerConfig(state_dir=path / "state", **config)) as runner:
        try:
            yield runner
        finally:
            with anyio.CancelScope(shield=True), fail_after(20):
                for job in await runner.list():
                    await job.stop(grace=0)


def shell(script: str, **fields: Any) -> JobSpec:
    return JobSpec("/bin/sh", ("-c", script), **fields)


async def run(runner: JobRunner, spec: JobSpec, seconds: float = 20) -> JobInfo:
    """Start a job and wait for its end."""
    with fail_after(seconds):
        return await (await runner.start(spec)).wait()


async def output(job: RunnerJob, stream: Stream | None = None, seconds: float = 20) -> bytes:
    """All the job writes, to its end."""
    with fail_after(seconds):
        async with job.log() as reader:
            return b"".join([part.data async for part in reader if isinstance(part, Chunk) and stream in (None, part.stream)])


async def run_output(runner: JobRunner, spec: JobSpec, seconds: float = 20) -> tuple[JobInfo, bytes]:
    """Start a job, read all of its output, and wait for its end."""
    with fail_after(seconds):
        job = await runner.start(spec)
        data = await output(job, seconds=seconds)
        return await job.wait(), data


def processes_with(marker: str) -> list[str]:
    """Command lines of the host's processes that contain this text."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                line = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if marker in line:
                found.append(line)
    return found


def shims_below(directory: Path) -> list[int]:
    """Shims of jobs below this directory: it is where they work."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and Path("/proc", entry, "cwd").readlink().is_relative_to(directory):
                found.append(int(entry))
        except OSError:
            continue
    return found


async def shims_gone(directory: Path, seconds: float = 20) -> None:
    """Until no job below this directory has a shim: no server is there to tell."""
    with fail_after(seconds):
        while await anyio.to_thread.run_sync(shims_below, directory):  # noqa: ASYNC110
            await anyio.sleep(0.02)


def cgroup_directories(name: str) -> list[str]:
    """Directories below any cgroup hierarchy whose path has this name in it."""
    return [path for path, _, _ in os.walk("/sys/fs/cgroup") if name in path.split("/")]
