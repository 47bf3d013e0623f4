"""A server over many jobs that have ended: it answers at once, answers right, and holds little of them."""

from __future__ import annotations

from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from jobrunner import JobSpec
from jobrunner.config import RunnerConfig
from jobrunner.errors import JobNotFound
from jobrunner.runner import JobRunner
from tests.support.daemon import ServerProcess
from tests.support.keptjobs import multiply
from tests.support.runner import open_runner, run
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

MANY = 1000


def rss(server: ServerProcess) -> int:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096


async def test_what_is_asked_before_all_is_loaded_is_answered_right(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        first = await run(runner, JobSpec("echo", ("hello",)))
    ids = multiply(tmp_path / "state", first.job_id, MANY)
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state"), wait=False) as runner:
        assert runner.catalog.is_unloaded(ids[-1])
        assert (await runner.get(ids[-1])).info().exit_code == 0
        with pytest.raises(JobNotFound):
            await runner.get("0123456789ab")
        again = await runner.start(JobSpec("echo", ("hello",), request_id=f"request-{ids[MANY // 2]}"))
        assert again.job_id == ids[MANY // 2]
        jobs = [job.job_id for job in await runner.list()]
        assert jobs == [*reversed(ids), first.job_id]
        await runner.remove(ids[0])
        assert len(await runner.list()) == MANY


async def test_memory_for_each_is_below_2_kib(tmp_path: Path) -> None:
    server = await anyio.to_thread.run_sync(ServerProcess, tmp_path)
    async with server.client() as client:
        job = await client.start("echo", "hello")
        await job.wait()
        await client.list()
        before = rss(server)
    await anyio.to_thread.run_sync(server.end)
    await anyio.to_thread.run_sync(multiply, server.state, job.job_id, MANY)
    server = await anyio.to_thread.run_sync(ServerProcess, tmp_path)
    with fail_after(30):
        async with server.client() as client:
            await client.list(name="nosuch")
            grown = rss(server) - before
            assert len(await client.list()) == MANY + 1
    await anyio.to_thread.run_sync(server.end)
    # Besides them there is what a server needs to load any: a thread's arena, buffers.
    assert grown < MANY * 2048 + (2 << 20)
