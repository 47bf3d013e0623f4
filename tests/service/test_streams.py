"""Many readers, slow readers, and none of them in another's way."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from pathlib import Path
from typing import Any

import anyio
import grpc
import pytest
from h2.events import DataReceived, StreamEnded

from jobrunner.log.chunks import BLOCK, LARGE
from jobrunner.log.reader import MESSAGE
from tests.support.http2 import RawPeer, framed, raw_peer
from tests.support.server import eventually, invoke, message, serving, start, subscribe, unary

pytestmark = pytest.mark.requires("root")

SUBSCRIBE = "/jobrunner.v1.JobService/SubscribeOutput"
FLOOD = "head -c 3000000 /dev/urandom | tee /dev/stderr | sha256sum | cut -c1-64"
ENDLESS = ("/bin/sh", "-c", "exec yes")
MUCH = ("/bin/sh", "-c", "yes | head -c 100000000; exec sleep 600")
"""More than any window, and less than what is kept."""
RESOURCE_EXHAUSTED = "8"


async def test_readers_that_join_at_any_time_all_have_every_byte(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/sh", "-c", FLOOD)
        told: list[bytes] = []

        async def read(delay: float) -> None:
            await anyio.sleep(delay)
            out, err, at = b"", hashlib.sha256(), 0
            async with running.channel(user="viewer") as own:
                async for part in subscribe(own, job_id=job_id):
                    assert part.offset == at
                    at += len(part.stdout + part.stderr)
                    out += part.stdout
                    err.update(part.stderr)
            assert err.hexdigest().encode() + b"\n" == out
            told.append(out)

        with anyio.fail_after(30):
            async with anyio.create_task_group() as readers:
                for _ in range(8):
                    readers.start_soon(read, random.uniform(0, 0.3))
        assert len(told) == 8
        assert len(set(told)) == 1


async def test_a_reader_that_reads_nothing_is_ended_and_the_others_go_on(tmp_path: Path) -> None:
    async with serving(tmp_path, send_timeout=0.3) as running, running.channel() as channel, raw_peer(running) as peer:
        job_id = await start(channel, *MUCH)
        request = message("JobSubscriptionRequest", job_id=job_id).SerializeToString()
        stream = await peer.request(SUBSCRIBE, framed(request))
        with anyio.fail_after(20):
            stalled = await peer.status(stream, read=False)
        assert stalled == (RESOURCE_EXHAUSTED, "cannot send: the client has read nothing for 0.3 s (send_timeout)")
        other = subscribe(channel, job_id=job_id)
        with anyio.fail_after(20):
            assert (await other.read()).stdout.startswith(b"y\n")
        other.cancel()


async def test_a_connection_that_takes_nothing_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path, send_timeout=0.3) as running, running.channel() as channel, raw_peer(running) as peer:
        job_id = await start(channel, *MUCH)
        request = message("JobSubscriptionRequest", job_id=job_id).SerializeToString()
        peer.h2.update_settings({4: (1 << 31) - 1})  # INITIAL_WINDOW_SIZE: only the connection is in the way
        peer.h2.increment_flow_control_window((1 << 31) - 65536)
        peer.pause()
        with caplog.at_level(logging.WARNING):
            await peer.request(SUBSCRIBE, framed(request))
            await eventually(lambda: any("it has read nothing for 0.3 s (send_timeout)" in text for text in caplog.messages))
        await eventually(lambda: len(running.server.listener.live) == 1)  # the channel's


async def test_messages_are_large_only_for_who_takes_them_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel, raw_peer(running) as peer:
        job_id = await start(channel, "/usr/bin/head", "-c", "3000000", "/dev/zero")
        await unary(channel, "Wait", "JobInfo")(message("JobWaitRequest", job_id=job_id))
        request = framed(message("JobSubscriptionRequest", job_id=job_id).SerializeToString())
        small = await _sizes(peer, await peer.request(SUBSCRIBE, request))
        peer.h2.update_settings({4: 1 << 20})  # INITIAL_WINDOW_SIZE
        peer.h2.increment_flow_control_window(1 << 24)
        large = await _sizes(peer, await peer.request(SUBSCRIBE, request))
    assert sum(small) - 3_000_000 < 10_000
    assert sum(large) - 3_000_000 < 10_000
    assert BLOCK < max(small) <= BLOCK + MESSAGE
    assert LARGE < max(large) <= LARGE + MESSAGE < 128 << 10


async def _sizes(peer: RawPeer, stream: int) -> list[int]:
    """Of a call's messages, which are read as they come."""
    data, sizes = b"", []
    with anyio.fail_after(20):
        ended = False
        while not ended:
            for event in await peer.receive():
                data += event.data or b"" if isinstance(event, DataReceived) else b""
                ended = ended or (isinstance(event, StreamEnded) and event.stream_id == stream)
    while data:
        sizes.append(int.from_bytes(data[1:5], "big"))
        data = data[5 + sizes[-1] :]
    return sizes


async def test_a_reader_of_a_flood_holds_up_no_other_call(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel, running.channel(user="viewer") as other:
        job_id = await start(channel, *ENDLESS)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_drain, subscribe(other, job_id=job_id))
            for _ in range(50):
                with anyio.fail_after(1):
                    await unary(channel, "QueryStatus", "JobInfo")(message("JobQueryRequest", job_id=job_id))
            tasks.cancel_scope.cancel()


async def _drain(output: Any) -> None:
    async for _ in output:
        pass


async def test_a_client_that_goes_away_leaves_no_call(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/sleep", "60")
        async with running.channel(user="viewer") as gone:
            watch = invoke(gone, "/grpc.health.v1.Health/Watch", "grpc.health.v1.HealthCheckResponse", "unary_stream")(b"")
            await watch.read()
            subscribe(gone, job_id=job_id)
        await eventually(lambda: not running.server._calls())


async def test_two_hundred_jobs_leave_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        await one_job(channel)
        before = len(os.listdir("/proc/self/fd"))
        with anyio.fail_after(50):
            for _ in range(20):
                async with anyio.create_task_group() as tasks:
                    for _ in range(10):
                        tasks.start_soon(one_job, channel)
        assert await running.runner.list() == []
        assert list((tmp_path / "state" / "jobs").iterdir()) == []
        assert running.server._calls() == []
        assert len(os.listdir("/proc/self/fd")) <= before


async def one_job(channel: grpc.aio.Channel) -> None:
    """Start, read to the end, remove."""
    job_id = await start(channel, "/bin/echo", "hi")
    assert b"".join([part.stdout async for part in subscribe(channel, job_id=job_id)]) == b"hi\n"
    await unary(channel, "Remove", "JobRemoveResponse")(message("JobRemoveRequest", job_id=job_id))
