"""What one peer may do to the server, with a certificate and without one."""

from __future__ import annotations

import asyncio
import logging
import ssl
import struct
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from jobrunner.server.turns import Turns
from tests.support.handshake import Handshake
from tests.support.http2 import HEADERS, RawPeer, client_context, framed, raw_peer
from tests.support.server import Running, eventually, serving

pytestmark = pytest.mark.requires("root")

QUERY = "/jobrunner.v1.JobService/QueryStatus"
NOT_FOUND = "5"


async def connect(running: Running) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare TCP connection."""
    host, _, port = running.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def closed(reader: asyncio.StreamReader) -> bool:
    """Whether the server closes the connection, soon, without having said anything."""
    with anyio.move_on_after(10):
        try:
            return await reader.read(1) == b""
        except OSError:
            return True
    return False


async def test_a_peer_that_never_begins_tls_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path, handshake_timeout=0.2) as running:
        with caplog.at_level(logging.WARNING):
            reader, writer = await connect(running)
            assert await closed(reader)
            writer.close()
        assert not running.server.listener.pending
    assert caplog.messages[0].endswith(" failed: not done within 0.2 s")


async def test_of_the_handshakes_too_many_the_oldest_gives_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path, max_pending_handshakes=2) as running:
        with caplog.at_level(logging.WARNING):
            waiting = [await connect(running) for _ in range(5)]
            for reader, _ in waiting[:3]:
                assert await closed(reader)
            async with raw_peer(running) as peer:  # who keeps to the protocol is not kept out by those who say nothing
                assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND
        assert len(running.server.listener.pending) <= 2
        for _, writer in waiting:
            writer.transport.abort()
    assert any(
        text.endswith("there are 2 handshakes, and this one has lasted for long (max_pending_handshakes)")
        for text in caplog.messages
    )
    assert not any("an unknown address" in text for text in caplog.messages)


async def test_clients_that_come_at_once_give_way_to_each_other_in_no_flood(tmp_path: Path) -> None:
    """All places are held by peers who have said a byte. Nothing of a client can have been read when the next one comes."""
    async with serving(tmp_path, max_pending_handshakes=8, handshake_timeout=60) as running:
        context, pending = client_context(running), running.server.listener.pending
        stalled = [await Handshake(context).connect(running.address) for _ in range(8)]
        for peer in stalled:
            await peer.send(1)
        await eventually(lambda: len(pending) == 8 and all(connection.heard for connection in pending))
        async with anyio.create_task_group() as clients:
            for _ in range(4):
                clients.start_soon(_shake_hands, running)
        for peer in stalled:
            peer.vanish()


async def test_who_comes_alone_from_his_address_does_not_give_way_to_many_of_another(tmp_path: Path) -> None:
    async with serving(tmp_path, max_pending_handshakes=4, handshake_timeout=60) as running:
        host, _, port = running.address.rpartition(":")
        pending = running.server.listener.pending
        peers = []
        for number, own in enumerate(("127.0.0.2", *["127.0.0.3"] * 9)):
            _, writer = await asyncio.open_connection(host, int(port), local_addr=(own, 0))
            writer.write(b"\x16")
            peers.append(writer)
            await eventually(lambda: any(each.address.endswith(_port(writer)) and each.heard for each in pending))  # noqa: B023
            assert len(pending) == min(number + 1, 4)
        assert [connection.host for connection in pending] == ["127.0.0.2", *["127.0.0.3"] * 3]
        for writer in peers:
            writer.transport.abort()


async def test_who_has_given_way_waits_for_no_turn(tmp_path: Path) -> None:
    """Else a flood that is faster than its handshakes go on would be kept as long as it is."""
    async with serving(tmp_path, max_pending_handshakes=4, handshake_timeout=60) as running:
        listener = running.server.listener
        waiting = listener._turns = Turns(0)  # nobody's goes on
        peers = []
        for _ in range(10):
            _, writer = await connect(running)
            writer.write(b"\x16")
            peers.append(writer)
            await eventually(lambda: any(each.address.endswith(_port(writer)) and each.heard for each in listener.pending))  # noqa: B023
        await eventually(lambda: len(listener.open) == 4 == sum(map(len, waiting._waiting.values())))
        for writer in peers:
            writer.transport.abort()


def _port(writer: asyncio.StreamWriter) -> str:
    return f":{writer.get_extra_info('sockname')[1]}"


async def _shake_hands(running: Running) -> None:
    peer = await Handshake(client_context(running)).connect(running.address)
    with anyio.fail_after(10):
        await peer.send(1 << 20)
        assert await peer.reader.read(1)
    peer.vanish()


async def test_peers_that_come_and_go_leave_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path, max_pending_handshakes=4) as running:
        for _ in range(100):
            _, writer = await connect(running)
            writer.transport.abort()
        async with raw_peer(running) as peer:  # there is room again
            assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND
        assert len(running.server._handlers) == 0


async def test_no_more_connections_than_allowed_are_served(tmp_path: Path) -> None:
    async with serving(tmp_path, max_connections=1) as running, raw_peer(running) as peer:
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND
        reader, writer = await connect(running)
        assert await closed(reader)
        writer.close()


async def test_connections_that_are_made_at_the_same_time_are_not_more_either(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, max_connections=1) as running:
        context = client_context(running)
        peers = [await Handshake(context).connect(running.address) for _ in range(5)]
        for peer in peers:
            await peer.send(1)  # each is accepted, and in its handshake
        await eventually(lambda: len(running.server.listener.pending) == 5)
        for peer in peers:
            await peer.send(1 << 20)
        await eventually(lambda: len(running.server.listener.open) == len(running.server.listener.live) == 1)
        assert sum("there are 1 connections (max_connections)" in text for text in caplog.messages) == 4
        assert running.server.connections == 1
        for peer in peers:
            peer.vanish()


async def test_a_peer_without_http2_is_cut(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, raw_peer(running, alpn=None) as peer:
        await peer.wait_lost()


async def test_tls_before_1_3_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        context = client_context(running)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        host, _, port = running.address.rpartition(":")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(host, int(port), ssl=context, server_hostname="localhost")


async def test_plain_text_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        reader, writer = await connect(running)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        with anyio.fail_after(10):
            answer = await reader.read(65536)
        assert answer[:1] in (b"", b"\x15")  # nothing, or a TLS alert (RFC 8446 section 5.1)
        writer.close()


async def test_an_address_is_known_as_long_as_a_client_is_connected_from_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        listener = running.server.listener
        strangers = listener.turns("127.0.0.1")
        async with raw_peer(running) as peer, raw_peer(running):
            await peer.receive()
            await eventually(lambda: listener.known == {"127.0.0.1": 2})
            assert listener.turns("127.0.0.1") is not strangers
            assert listener.turns("127.0.0.2") is strangers
        await eventually(lambda: not listener.known)
        assert listener.turns("127.0.0.1") is strangers


async def test_a_frame_of_an_unknown_type_is_ignored(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        peer.writer.write(frame(0xEE, b"future"))
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND


async def test_a_frame_longer_than_agreed_is_cut_before_it_is_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        await peer.receive()
        peer.writer.write(struct.pack("!I", 1 << 24)[:3])
        peer.writer.write(frame(0, bytes(100_000), length=1 << 23)[:100_000])
        await peer.wait_lost()


async def test_a_peer_that_does_not_read_the_answers_to_its_pings_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path, max_calls_per_second=1_000_000) as running, raw_peer(running) as peer:
        peer.pause()
        pings = frame(6, bytes(8)) * 10_000
        with caplog.at_level(logging.WARNING), anyio.move_on_after(20), suppress(OSError):
            while True:
                peer.writer.write(pings)
                await peer.writer.drain()
        assert any("does not read the answers to its control frames" in text for text in caplog.messages)


async def test_calls_that_are_reset_in_a_flood_are_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path, max_streams_per_connection=2) as running, raw_peer(running) as peer:
        await peer.receive()
        for _ in range(200):
            peer.h2.reset_stream(open_call(peer))
        with caplog.at_level(logging.WARNING):
            await peer.flush()
            await peer.wait_lost()
        assert any("resets calls faster" in text for text in caplog.messages)


async def test_calls_that_are_reset_at_once_leave_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        await peer.receive()
        for _ in range(50):
            peer.h2.reset_stream(open_call(peer))
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND
        assert running.server._calls() == []


def open_call(peer: RawPeer) -> int:
    """Headers of a call, not sent yet; its id."""
    stream = peer.h2.get_next_available_stream_id()
    peer.h2.send_headers(stream, [(":path", QUERY), *HEADERS])
    return stream


def frame(kind: int, payload: bytes, length: int | None = None) -> bytes:
    """An HTTP/2 frame on stream 0 (RFC 9113 section 4.1)."""
    size = len(payload) if length is None else length
    return struct.pack("!I", size)[1:] + bytes([kind, 0]) + bytes(4) + payload
