"""A server that goes away says so, to everyone, in time; the jobs run on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import anyio
import grpc
import grpc.aio
import pytest

from jobrunner.config import RunnerConfig
from jobrunner.job import JobStatus
from jobrunner.runner import JobRunner
from tests.support.http2 import raw_peer
from tests.support.server import Running, eventually, failure, invoke, message, serving, start, subscribe, unary

pytestmark = pytest.mark.requires("root")

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
HEALTH = "grpc.health.v1.HealthCheckResponse"


async def begin(running: Running) -> asyncio.Task[None]:
    """Start to shut down, as `serve` does when it is left."""
    task = asyncio.create_task(running.server.shutdown())
    await running.server.draining.wait()
    return task


def health_watch(channel: grpc.aio.Channel) -> Any:
    return invoke(channel, "/grpc.health.v1.Health/Watch", HEALTH, "unary_stream")(b"")


async def test_calls_that_wait_end_with_unavailable_and_say_why(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/sleep", "60")
        output = subscribe(channel, job_id=job_id)
        waiting = unary(channel, "Wait", "JobInfo")(message("JobWaitRequest", job_id=job_id))
        health = health_watch(channel)
        with anyio.fail_after(10):
            assert (await health.read()).status == 1  # SERVING
            await eventually(lambda: len(running.server._calls()) == 3)
            shutdown = await begin(running)
            assert await failure(waiting) == (UNAVAILABLE, "cannot call Wait: the server is shutting down")
            assert await failure(output.read()) == (UNAVAILABLE, "cannot call SubscribeOutput: the server is shutting down")
            assert (await health.read()).status == 2  # NOT_SERVING
            assert await failure(health.read()) == (UNAVAILABLE, "cannot watch health: the server is shutting down")
            await shutdown


async def test_while_draining_new_calls_are_unavailable_and_old_ones_are_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done")
        assert (await subscribe(channel, job_id=job_id).read()).stdout == b"up\n"
        request = message("JobStopRequest", job_id=job_id)
        request.grace.FromMilliseconds(500)
        stopping = unary(channel, "Stop", "JobStopResponse")(request)
        with anyio.fail_after(10):
            await eventually(lambda: any(stream.method.endswith("/Stop") for stream in running.server._calls()))
            shutdown = await begin(running)
            told = await failure(unary(channel, "List", "JobListResponse")(message("JobListRequest")))
            assert told == (UNAVAILABLE, "cannot call List: the server is shutting down")
            assert (await invoke(channel, "/grpc.health.v1.Health/Check", HEALTH)(b"")).status == 2  # NOT_SERVING
            assert (await stopping).message == "Job successfully stopped"
            await shutdown


async def test_a_peer_that_does_not_close_its_side_is_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        await peer.receive()
        with anyio.fail_after(5):
            await running.server.shutdown()
            await peer.wait_lost()
        assert not running.server.listener.live


async def test_nothing_listens_afterwards_and_the_jobs_run_on(tmp_path: Path) -> None:
    async with serving(tmp_path, keep_jobs=True) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/sleep", "60")
    host, _, port = running.address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        job = await runner.get(job_id)
        assert job.status is JobStatus.RUNNING
        await job.stop(grace=0)
