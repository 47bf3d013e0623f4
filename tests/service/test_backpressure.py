"""Readers that do not read, and connections on which nothing happens: who is affected, and who is not."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from h2.settings import SettingCodes

from jobrunner import JobStatus
from jobrunner.client import JobClient, channel
from jobrunner.client.reader import PREFETCH
from jobrunner.output import Chunk
from jobrunner.server import http2
from jobrunner.server.http2 import CONFIGURATION, MAX_UNSENT
from jobrunner.server.shared import ServerConnection
from jobrunner.server.stream import MAX_AT_ONCE
from tests.support.http2 import framed, raw_peer
from tests.support.proxy import proxy_to
from tests.support.server import eventually, message, serving, start
from tests.support.timing import fail_after

if TYPE_CHECKING:
    from tests.support.daemon import ServerProcess

pytestmark = pytest.mark.requires("root")

UNREAD = 40
SUBSCRIBE = "/jobrunner.v1.JobService/SubscribeOutput"


async def test_many_unread_logs_hold_back_no_other_call_of_their_connection(server: ServerProcess) -> None:
    size = PREFETCH + 2 * channel.STREAM_WINDOW
    with fail_after(50):
        async with server.client() as client, AsyncExitStack() as stack:
            job = await client.start("head", "-c", str(size), "/dev/zero")
            await job.wait()
            readers = [await stack.enter_async_context(job.log()) for _ in range(UNREAD)]
            for reader in readers:
                await anext(reader)
            # Each has what it may have: that much before its caller takes it, and a full window that is not given back.
            await eventually(lambda: all(reader._held >= PREFETCH for reader in readers))
            assert await job.status() is JobStatus.COMPLETED
            async with job.log() as other:
                assert sum([len(part.data) async for part in other if isinstance(part, Chunk)]) == size


@pytest.mark.parametrize(
    ("method", "prefix", "status"),
    [("QueryStatus", None, "5"), ("QueryStatus", b"\0\x06\0\0\0", "8"), ("WriteInput", None, "12"), ("Nothing", None, "12")],
    ids=["read", "too-long", "unread", "unknown"],
)
async def test_what_a_peer_has_sent_never_takes_its_connection_s_window(
    tmp_path: Path, method: str, prefix: bytes | None, status: str
) -> None:
    """What the server lets a peer send ahead is little, and is given back whether or not anyone has read it."""
    body = framed(message("JobQueryRequest", job_id="x" * 100_000).SerializeToString())
    if prefix is not None:
        body = prefix + body[5:]
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        stream = await peer.request("/jobrunner.v1.JobService/QueryStatus", framed(b""))
        await peer.status(stream)
        assert peer.h2.remote_settings.initial_window_size == CONFIGURATION.http2_stream_window_size == 128 << 10
        assert peer.h2.outbound_flow_control_window <= CONFIGURATION.http2_connection_window_size == 512 << 10
        with fail_after(20):
            for _ in range(15):
                stream = await peer.request(f"/jobrunner.v1.JobService/{method}", body)
                assert (await peer.status(stream))[0] == status
        assert peer.h2.outbound_flow_control_window >= CONFIGURATION.http2_connection_window_size // 2


async def test_a_silent_follow_survives_a_proxy_that_drops_idle_connections(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the default of 20 s it takes a proxy that is more patient; everything else is as it is."""
    often = replace(channel._CONFIGURATION, _keepalive_time=0.5, _http2_min_sent_ping_interval_without_data=0.1)
    monkeypatch.setattr(channel, "_CONFIGURATION", often)
    files = server.files()
    with fail_after(30):
        async with proxy_to(server.address) as proxy, server.client() as direct:
            proxy.idle = 3
            async with JobClient(proxy.address, ca=files["ca"], cert=files["cert"], key=files["key"]) as client:
                job = await client.start("sh", "-c", "echo begin; sleep 7; echo end")
                async with job.log() as reader:
                    data = b"".join([part.data async for part in reader if isinstance(part, Chunk)])
                assert proxy.cuts == 0
            assert await direct.get(job.job_id).status() is JobStatus.COMPLETED
    assert data == b"begin\nend\n"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides ask twice a second, and wait for a second."""
    often: dict[str, Any] = {"_keepalive_time": 0.5, "_keepalive_timeout": 1, "_http2_min_sent_ping_interval_without_data": 0.1}
    monkeypatch.setattr(channel, "_CONFIGURATION", replace(channel._CONFIGURATION, **often))
    monkeypatch.setattr(http2, "CONFIGURATION", replace(CONFIGURATION, **often))


@pytest.mark.usefixtures("impatient")
async def test_a_slow_line_is_no_dead_peer(tmp_path: Path) -> None:
    """PINGs of both sides wait behind a megabyte of output: for longer than one who is dead would be waited for."""
    size = channel.STREAM_WINDOW * 3 // 2
    async with serving(tmp_path) as running, proxy_to(running.address) as proxy:
        proxy.rate = channel.STREAM_WINDOW / 4
        own = running.pair("admin", "admin")
        with fail_after(50):
            async with JobClient(proxy.address, ca=running.authority.pem, cert=own.cert, key=own.key) as client:
                job = await client.start("head", "-c", str(size), "/dev/zero")
                async with job.log() as reader:
                    assert sum([len(part.data) async for part in reader if isinstance(part, Chunk)]) == size
        assert proxy.accepted == 1


@pytest.mark.usefixtures("impatient")
async def test_who_sends_on_a_slow_line_is_not_dead(tmp_path: Path) -> None:
    """As above, behind a request: the client's PINGs, and its answers to the server's. Impatient, neither would end it."""
    window = CONFIGURATION.http2_stream_window_size
    async with serving(tmp_path) as running, proxy_to(running.address, rate_up=window / 4) as proxy:
        own = running.pair("admin", "admin")
        with fail_after(50):
            async with JobClient(proxy.address, ca=running.authority.pem, cert=own.cert, key=own.key) as client:
                await client.start("true", "x" * (window * 3 // 4), "y" * (window * 3 // 4))


async def test_a_peer_that_answers_nothing_any_more_is_dead_though_its_kernel_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often: dict[str, Any] = {"_keepalive_time": 0.2, "_keepalive_timeout": 0.2, "_http2_min_sent_ping_interval_without_data": 0.1}
    monkeypatch.setattr(http2, "CONFIGURATION", replace(CONFIGURATION, **often))
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        assert (await peer.status(await peer.request("/grpc.health.v1.Health/Check", framed(b""))))[0] == "0"
        peer.pause()
        await eventually(lambda: not running.server.listener.live)
        assert running.server.account.metrics.connections_ended == {"keepalive": 1}


async def test_a_stalled_reader_is_closed_at_once_with_all_that_it_held(tmp_path: Path) -> None:
    def held() -> int:
        """Descriptors of this process, which is the server, on files of logs."""
        links = [_link(name) for name in os.listdir("/proc/self/fd")]
        return sum("/log/" in link for link in links)

    async with serving(tmp_path, send_timeout=0.3) as running, running.channel() as client, raw_peer(running) as peer:
        job_id = await start(client, "/bin/sh", "-c", "exec yes")
        request = message("JobSubscriptionRequest", job_id=job_id).SerializeToString()
        stream = await peer.request(SUBSCRIBE, framed(request))
        await eventually(lambda: held() > 0)
        with anyio.fail_after(20):
            status, _ = await peer.status(stream, read=False)
        assert status == "8"
        await eventually(lambda: held() == 0 and not running.server._calls())


async def test_what_a_peer_reads_bit_by_bit_is_not_answered_by_all_its_calls_at_once(tmp_path: Path) -> None:
    """However large its windows are, the server holds for it what one of them sends beyond the bound, not all."""
    most = 0
    async with serving(tmp_path) as running, running.channel() as client, raw_peer(running) as peer:
        job_id = await start(client, "/bin/sh", "-c", "exec yes")
        peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 30, SettingCodes.MAX_FRAME_SIZE: 1 << 18})
        peer.h2.increment_flow_control_window(1 << 30)
        request = framed(message("JobSubscriptionRequest", job_id=job_id).SerializeToString())
        for _ in range(UNREAD):
            await peer.request(SUBSCRIBE, request)
        await eventually(lambda: len(running.server._calls()) == UNREAD)
        (protocol,) = (each for each in running.server._connections if len(each.streams()) == UNREAD)

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, protocol.transport.get_write_buffer_size())
                await anyio.lowlevel.checkpoint()

        with fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(watch)
                for _ in range(200):
                    assert await peer.reader.read(65536)
                group.cancel_scope.cancel()
        connection = protocol.connection
        assert isinstance(connection, ServerConnection)
        assert connection.line.held, "they wait for it"
    assert MAX_UNSENT < most < MAX_UNSENT + 2 * MAX_AT_ONCE


def _link(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""
