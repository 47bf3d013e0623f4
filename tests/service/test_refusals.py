"""Whatever is refused has a line in the audit log: who, what, and why. One row for each kind of refusal that there is."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from h2.exceptions import ProtocolError

from tests.support.certs import Pair
from tests.support.http2 import HEADERS, RawPeer, client_context, framed, raw_peer
from tests.support.server import Running, eventually, failure, message, serving, start, subscribe, unary
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

QUERY = "/jobrunner.v1.JobService/QueryStatus"
START = "/jobrunner.v1.JobService/Start"
Act = Callable[[Running], Awaitable[None]]


@dataclass(frozen=True)
class Case:
    act: Act
    line: dict[str, str]
    """Fields of a line that is there then; `event` as it is, others as patterns."""
    settings: dict[str, Any] = field(default_factory=dict)
    user: str | None = "admin"
    """Whose certificate is told; None if there is no good one."""


async def send(peer: RawPeer, data: bytes = framed(b""), **headers: str | None) -> int:
    """A request whose pseudo-headers and headers differ from a good one; None leaves one out. Names are written with `_`."""
    known = {":path": QUERY, **dict(HEADERS)}
    given = {(":" if f":{name}" in known else "") + name.replace("_", "-"): value for name, value in headers.items()}
    stream = peer.h2.get_next_available_stream_id()
    peer.h2.send_headers(stream, [(name, value) for name, value in (known | given).items() if value is not None])
    peer.h2.send_data(stream, data, end_stream=True)
    await peer.flush()
    return stream


def request(data: bytes = framed(b""), user: str = "admin", times: int = 1, **headers: str | None) -> Act:
    """Requests that are answered one by one, or whose connection is ended."""

    async def act(running: Running) -> None:
        async with raw_peer(running, user) as peer:
            for _ in range(times):
                with suppress(ProtocolError):  # the connection has been ended
                    await peer.status(await send(peer, data, **headers))

    return act


def frames(data: bytes, alpn: str | None = "h2") -> Act:
    """Bytes that end the connection."""

    async def act(running: Running) -> None:
        async with raw_peer(running, alpn=alpn) as peer:
            with suppress(OSError):
                peer.writer.write(data)
                await peer.wait_lost()

    return act


def handshake(user: str = "admin", **context: Any) -> Act:
    """TLS that fails, by a setting of the client's context."""

    async def act(running: Running) -> None:
        own = client_context(running, user)
        for name, value in context.items():
            setattr(own, name, value)
        await connect(running, own)

    return act


def certificate(make: Callable[[Running], Pair | None]) -> Act:
    async def act(running: Running) -> None:
        context = ssl.create_default_context(cafile=running.authority.pem)
        if pair := make(running):
            context.load_cert_chain(pair.cert, pair.key)
        context.set_alpn_protocols(["h2"])
        await connect(running, context)

    return act


async def connect(running: Running, context: ssl.SSLContext | None, say: bytes = b"") -> None:
    """A connection that says this and listens to the end."""
    host, _, port = running.address.rpartition(":")
    with suppress(OSError):
        name = "localhost" if context else None
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=name)
        writer.write(say)
        with suppress(OSError):
            await reader.read()
        writer.transport.abort()


async def leave(running: Running) -> None:
    host, _, port = running.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"\x16\x03\x01")
    await writer.drain()
    writer.transport.abort()


async def plain(running: Running) -> None:
    await connect(running, None, b"GET / HTTP/1.1\r\n\r\n")


async def silent(running: Running) -> None:
    await connect(running, None)


async def two_connections(running: Running) -> None:
    async with raw_peer(running) as peer:
        await peer.status(await send(peer))
        async with AsyncExitStack() as stack:
            with suppress(OSError):
                second = await stack.enter_async_context(raw_peer(running))
                await second.wait_lost()


async def two_handshakes(running: Running) -> None:
    host, _, port = running.address.rpartition(":")
    writers = []
    for _ in range(2):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x16")
        await eventually(lambda: any(one.heard for one in running.server.listener.pending))
        writers.append(writer)
    await eventually(lambda: bool(running.server.account.metrics.refusals))
    for writer in writers:
        writer.transport.abort()


async def two_calls(running: Running) -> None:
    async with raw_peer(running) as peer:
        await peer.request(QUERY, end=False)
        await eventually(lambda: running.server.calls == 1)
        await peer.status(await peer.request(QUERY, framed(b"")))


async def two_unfinished_messages(running: Running) -> None:
    half = framed(bytes(60_000))[:1000]
    async with raw_peer(running) as peer:
        await peer.request(QUERY, half, end=False)
        await peer.status(await peer.request(QUERY, half, end=False))


async def half_a_message(running: Running) -> None:
    async with raw_peer(running) as peer:
        await peer.status(await peer.request(QUERY, framed(bytes(100))[:50], end=False))


async def many_starts(running: Running) -> None:
    async with running.channel() as channel:
        await start(channel, "sleep", "60")
        await failure(unary(channel, "Start", "JobStartResponse")(message("JobStartRequest", command="true")))


async def two_workspaces(running: Running) -> None:
    async with running.channel() as channel:
        await start(channel, "true", workspace="one")
        more = message("JobStartRequest", command="true", workspace="two")
        await failure(unary(channel, "Start", "JobStartResponse")(more))


async def two_followers(running: Running) -> None:
    async with running.channel() as channel:
        job = await start(channel, "sh", "-c", "echo; exec sleep 60")
        first = subscribe(channel, job_id=job)
        await first.read()
        await failure(subscribe(channel, job_id=job).read())
        first.cancel()


async def a_follower_that_reads_nothing(running: Running) -> None:
    async with running.channel() as channel, raw_peer(running) as peer:
        job = await start(channel, "sh", "-c", "exec yes")
        asked = message("JobSubscriptionRequest", job_id=job).SerializeToString()
        stream = await peer.request("/jobrunner.v1.JobService/SubscribeOutput", framed(asked))
        await peer.status(stream, read=False)


async def unread_pings(running: Running) -> None:
    async with raw_peer(running) as peer:
        peer.pause()
        with suppress(OSError):
            while running.server.account.metrics.connections_ended.total() == 0:
                peer.writer.write(ping() * 10_000)
                await peer.writer.drain()


async def calls_that_are_reset(running: Running) -> None:
    async with raw_peer(running) as peer:
        await peer.receive()
        for _ in range(200):
            stream = peer.h2.get_next_available_stream_id()
            peer.h2.send_headers(stream, [(":path", QUERY), *HEADERS])
            peer.h2.reset_stream(stream)
        await peer.flush()
        await peer.wait_lost()


async def malformed_trailers(running: Running) -> None:
    async with raw_peer(running) as peer:
        peer.h2.config.validate_outbound_headers = peer.h2.config.normalize_outbound_headers = False
        stream = await peer.request(QUERY, end=False)
        peer.h2.send_headers(stream, [("connection", "close")], end_stream=True)
        await peer.flush()
        await peer.status(stream)


async def a_malformed_header(running: Running) -> None:
    async with raw_peer(running) as peer:
        peer.h2.config.validate_outbound_headers = peer.h2.config.normalize_outbound_headers = False
        await peer.status(await send(peer, connection="close"))


async def a_call_while_it_drains(running: Running) -> None:
    running.server.draining.set()
    await request()(running)


def ping() -> bytes:
    return b"\0\0\x08\x06\0\0\0\0\0" + bytes(8)


def denied(reason: str, rpc: str = re.escape(QUERY), **more: Any) -> dict[str, Any]:
    return {"line": {"event": "denied", "rpc": rpc, "reason": reason}, **more}


def refused(bound: str, rpc: str = re.escape(QUERY), **more: Any) -> dict[str, Any]:
    return {"line": {"event": "refused", "bound": bound, "rpc": rpc, "reason": "."}, **more}


def ended(bound: str, rpc: str = QUERY, **more: Any) -> dict[str, Any]:
    """A call that was let through and met a bound."""
    return {"line": {"event": "done", "bound": bound, "rpc": re.escape(rpc), "outcome": "RESOURCE_EXHAUSTED"}, **more}


def cut(reason: str, **more: Any) -> dict[str, Any]:
    return {"line": {"event": "cut", "reason": reason}, **more}


def failed(reason: str) -> dict[str, Any]:
    return {"line": {"event": "handshake", "reason": reason}, "user": None}


FAST: dict[str, Any] = {"max_calls_per_second": 1_000_000}
SERVER = ExtendedKeyUsageOID.SERVER_AUTH
CASES = {
    # What is no call: the request is none of gRPC's.
    "another method": Case(request(method="GET"), **denied("HTTP 405")),
    "no content type": Case(request(content_type=None), **denied("HTTP 415: Missing content-type header")),
    "another content type": Case(request(content_type="text/plain"), **denied("HTTP 415: Unacceptable content-type header")),
    "another codec": Case(request(content_type="application/grpc+json"), **denied("HTTP 415: Unacceptable content-type")),
    "no trailers wanted": Case(request(te=None), **denied('HTTP 400: Required "te: trailers" header is missing')),
    "an unknown RPC": Case(request(path="/jobrunner.v1.JobService/start"), **denied("Method not found", ".*/start")),
    "a path that is none": Case(request(path="/../../etc"), **denied("Method not found", "/../../etc")),
    "a long path": Case(request(path="/" + "a" * 9000), **denied("Method not found", "/a{511}")),
    "a deadline that is none": Case(request(grpc_timeout="soon"), **denied("Invalid grpc-timeout header")),
    "headers that cannot be read": Case(request(x_bin="A"), **denied("its headers cannot be read")),
    "a malformed header": Case(a_malformed_header, **denied("the request is malformed: ", "")),
    "malformed trailers": Case(malformed_trailers, **denied("the request is malformed: ", "")),
    # What its caller may not do, or nobody now.
    "another role": Case(request(path=START, user="viewer"), **denied("cannot call Start: the role viewer", START), user="viewer"),
    "no role": Case(request(user="operator"), **denied('cannot call .*"operator", is no role'), user="operator"),
    "a server that leaves": Case(a_call_while_it_drains, **denied("cannot call QueryStatus: the server is shutting down")),
    # Bounds, before it is a call.
    "headers too long": Case(request(x_long="a" * 20_000), **refused("max_header_size")),
    "calls too fast": Case(request(times=2), **refused("max_calls_per_second"), settings={"max_calls_per_second": 0.1}),
    "starts too fast": Case(
        request(path=START, times=2), **refused("max_starts_per_second", START), settings={"max_starts_per_second": 0.1}
    ),
    "calls at once of a user": Case(two_calls, **refused("max_calls_per_user"), settings={"max_calls_per_user": 1}),
    "calls at once of a connection": Case(
        two_calls, **refused("max_streams_per_connection"), settings={"max_streams_per_connection": 1}
    ),
    "connections": Case(two_connections, **refused("max_connections", ""), settings={"max_connections": 1}, user=None),
    "handshakes": Case(
        two_handshakes, **refused("max_pending_handshakes", ""), settings={"max_pending_handshakes": 1}, user=None
    ),
    # Bounds that a call meets.
    "a message too long": Case(request(framed(bytes(70_000))[:5]), **ended("max_message"), settings={"max_message": 65536}),
    "messages too long": Case(
        two_unfinished_messages,
        **ended("max_messages_per_user"),
        settings={"max_message": 65536, "max_messages_per_user": 65536},
    ),
    "fields too many": Case(
        request(framed(b"\x12\x00" * 300), path=START), **ended("max_fields", START), settings={"max_fields": 256}
    ),
    "no message": Case(half_a_message, **ended("receive_timeout"), settings={"receive_timeout": 0.2}),
    "jobs": Case(many_starts, **ended("max_running", START), settings={"runner": {"max_running": 1}}),
    "jobs of a user": Case(many_starts, **ended("max_running_per_user", START), settings={"runner": {"max_running_per_user": 1}}),
    "workspaces": Case(
        two_workspaces,
        **ended("workspaces_per_user", START),
        settings={"runner": {"workspaces": True, "workspaces_per_user": 1}},
    ),
    "followers": Case(
        two_followers,
        **ended("max_followers_per_job", "/jobrunner.v1.JobService/SubscribeOutput"),
        settings={"max_followers_per_job": 1},
    ),
    "a stream that is not read": Case(
        a_follower_that_reads_nothing,
        **ended("send_timeout", "/jobrunner.v1.JobService/SubscribeOutput"),
        settings={"send_timeout": 0.5},
    ),
    # Ends of connections.
    "calls much too fast": Case(request(times=40), **cut(".*max_calls_per_second"), settings={"max_calls_per_second": 1}),
    "connections of a user": Case(
        two_connections, **cut("cannot connect: .*max_connections_per_user"), settings={"max_connections_per_user": 1}
    ),
    "frames too fast": Case(
        frames(ping() * 400), **cut("cannot go on: .*max_frames_per_second"), settings={"max_frames_per_second": 100}
    ),
    "a frame too long": Case(frames(b"\xff\xff\xff\0\0\0\0\0\1"), **cut("cannot go on: a frame of 16777215 bytes")),
    "headers much too long": Case(
        request(x_a="a" * 5000, x_b="a" * 5000, x_c="a" * 5000, x_d="a" * 5000),
        **cut("cannot go on: .*max_header_size"),
        settings={"max_header_size": 4096},
    ),
    "an error of the protocol": Case(frames(b"\0\0\x05\x06\0\0\0\0\0hello"), **cut("cannot go on: ")),
    "answers that are not read": Case(
        unread_pings, **cut("it does not read .*max_unread_answers"), settings=FAST | {"max_unread_answers": 16384}
    ),
    "resets": Case(calls_that_are_reset, **cut("it resets calls faster"), settings={"max_streams_per_connection": 2}),
    "no HTTP/2": Case(frames(b"", alpn=None), **cut("it does not speak HTTP/2")),
    # Handshakes. Those with certificates of every kind: `test_certificates`.
    "no certificate": Case(certificate(lambda running: None), **failed("peer did not return a certificate")),
    "an expired certificate": Case(
        certificate(lambda running: running.authority.issue("old", ["admin"], expired=True)), **failed("certificate has expired")
    ),
    "a server's certificate": Case(
        certificate(lambda running: running.authority.issue("posing", ["admin"], usages=[SERVER])), **failed("unsuitable ")
    ),
    "TLS 1.2": Case(handshake(maximum_version=ssl.TLSVersion.TLSv1_2), **failed("unsupported protocol")),
    "no TLS": Case(plain, **failed("http request")),
    "who leaves": Case(leave, **failed("the client closed the connection")),
    "silence": Case(silent, **failed("not done within 0.2 s"), settings={"handshake_timeout": 0.2}),
}  # fmt: skip


def matches(line: dict[str, Any], wanted: dict[str, str]) -> bool:
    return all(re.match(pattern, str(line.get(name, ""))) for name, pattern in wanted.items())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_it_has_a_line(tmp_path: Path, case: Case) -> None:
    log = tmp_path / "audit.jsonl"

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in log.read_text().splitlines()]

    async with serving(tmp_path, audit_log=log, **case.settings) as running:
        with fail_after(30):
            await case.act(running)
            with anyio.move_on_after(10):
                await eventually(lambda: any(matches(line, case.line) for line in lines()))
        told = [line for line in lines() if matches(line, case.line)]
        assert told, lines()
        assert told[0]["address"].startswith("127.0.0.1:")
        if case.user is None:
            assert "user" not in told[0]
        else:
            assert (told[0]["user"], told[0]["role"]) == (case.user, case.user)
            assert int(told[0]["serial"], 16) > 1
