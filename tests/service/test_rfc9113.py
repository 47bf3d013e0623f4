"""What RFC 9113 calls an error is answered as it says: by which frames, for the stream or for the connection, with which code.

A stream error may be treated as a connection error (section 5.4.1); where the server does so is told in ENDS_THE_CONNECTION.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest
from h2.errors import ErrorCodes
from hpack import Encoder

from tests.support.http2 import client_context
from tests.support.server import Running, serving
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PROBE, AGAIN = b"are you ", b"there?  "
PROTOCOL, FLOW, CLOSED, SIZE = (
    ErrorCodes.PROTOCOL_ERROR,
    ErrorCodes.FLOW_CONTROL_ERROR,
    ErrorCodes.STREAM_CLOSED,
    ErrorCodes.FRAME_SIZE_ERROR,
)
COMPRESSION, REFUSED = ErrorCodes.COMPRESSION_ERROR, ErrorCodes.REFUSED_STREAM
PSEUDO = [(":method", "POST"), (":scheme", "https"), (":path", "/jobrunner.v1.JobService/Start"), (":authority", "localhost")]
PLAIN = [("te", "trailers"), ("content-type", "application/grpc")]


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack("!I", len(payload))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + payload


def block(*fields: tuple[str, str]) -> bytes:
    """A field block that needs no table: each row begins with a decoder of its own."""
    return bytes(Encoder().encode([(name, value, True) for name, value in fields], huffman=False))


def headers(fields: list[tuple[str, str]] | None = None, *, stream: int = 1, flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, block(*(PSEUDO + PLAIN if fields is None else fields)), flags=flags, stream=stream)


def settings(code: int, value: int) -> bytes:
    return frame(SETTINGS, struct.pack("!HI", code, value))


def window(increment: int, stream: int = 0) -> bytes:
    return frame(WINDOW_UPDATE, struct.pack("!I", increment), stream=stream)


class Row(NamedTuple):
    section: str
    sent: bytes
    scope: str
    """`stream`, `connection`, or `none` for what is no error."""
    codes: tuple[ErrorCodes, ...] = (PROTOCOL,)


OPEN, HALF_CLOSED = headers(), headers(flags=END_HEADERS | END_STREAM)
RESET = frame(RST_STREAM, bytes(4), stream=1)
WATCH = headers([*PSEUDO[:2], (":path", "/grpc.health.v1.Health/Watch"), PSEUDO[3], *PLAIN])
"""Its one message is read and no more."""
TABLE = {
    "a frame longer than SETTINGS_MAX_FRAME_SIZE": Row("4.2", headers() + frame(DATA, bytes(16385), stream=1), "stream", (SIZE,)),
    "a SETTINGS frame that is too long": Row("4.2", frame(SETTINGS, bytes(16386)), "connection", (SIZE,)),
    "a field block that cannot be decoded": Row(
        "4.3", frame(HEADERS, b"\xff\xff\xff\xff", flags=5, stream=1), "connection", (COMPRESSION,)
    ),
    "an index that is in no table": Row("4.3", frame(HEADERS, b"\xbf\x20", flags=5, stream=1), "connection", (COMPRESSION,)),
    "a table that is too large": Row("4.3", frame(HEADERS, b"\x3f\xe2\x1f\x20", flags=5, stream=1), "connection", (COMPRESSION,)),
    "DATA on an idle stream": Row("5.1", frame(DATA, b"x", stream=1), "connection"),
    "RST_STREAM on an idle stream": Row("6.4", RESET, "connection"),
    "WINDOW_UPDATE on an idle stream": Row("5.1", window(1, 1), "connection"),
    "CONTINUATION without HEADERS": Row("6.10", frame(CONTINUATION, b"", flags=END_HEADERS, stream=1), "connection"),
    "PRIORITY on an idle stream": Row("5.1", frame(PRIORITY, bytes(4) + b"\x0f", stream=7), "none"),
    "DATA on a half-closed stream": Row("5.1", HALF_CLOSED + frame(DATA, b"x", stream=1), "stream", (CLOSED,)),
    "HEADERS on a half-closed stream": Row("5.1", HALF_CLOSED + HALF_CLOSED, "stream", (CLOSED,)),
    "DATA on a stream that was reset": Row("5.1", OPEN + RESET + frame(DATA, b"x", stream=1), "stream", (CLOSED,)),
    "HEADERS on a stream that was reset": Row("5.1", OPEN + RESET + OPEN, "stream", (CLOSED,)),
    "WINDOW_UPDATE on a half-closed stream": Row("5.1", HALF_CLOSED + window(1, 1), "none"),
    "a stream with an even number": Row("5.1.1", headers(stream=2), "connection"),
    "a stream number below the last": Row("5.1.1", headers(stream=5) + headers(stream=3), "connection"),
    "more streams than allowed": Row("5.1.2", b"".join(headers(stream=2 * n + 1) for n in range(5)), "stream", (REFUSED, PROTOCOL)),
    "a frame of an unknown type": Row("5.5", frame(0xEE, b"x", stream=9, flags=0xFF), "none"),
    "an unknown frame within a field block": Row("5.5", headers(flags=0) + frame(0xEE, b"x"), "connection"),
    "DATA on stream 0": Row("6.1", frame(DATA, b"x"), "connection"),
    "DATA with more padding than frame": Row("6.1", OPEN + frame(DATA, b"\x08x", flags=PADDED, stream=1), "connection"),
    "HEADERS on stream 0": Row("6.2", headers(stream=0), "connection"),
    "HEADERS with more padding than frame": Row(
        "6.2", frame(HEADERS, b"\xff\x00", flags=END_HEADERS | PADDED, stream=1), "connection"
    ),
    "a frame within a field block": Row("6.2", headers(flags=0) + frame(PING, bytes(8)), "connection"),
    "CONTINUATION of another stream": Row("6.10", headers(flags=0) + frame(CONTINUATION, flags=4, stream=3), "connection"),
    "PRIORITY on stream 0": Row("6.3", frame(PRIORITY, bytes(5)), "connection"),
    "PRIORITY of a wrong size": Row("6.3", OPEN + frame(PRIORITY, bytes(4), stream=1), "stream", (SIZE,)),
    "a stream that depends on itself": Row("5.3.2", frame(PRIORITY, struct.pack("!IB", 1, 15), stream=1), "none"),
    "RST_STREAM on stream 0": Row("6.4", frame(RST_STREAM, bytes(4)), "connection"),
    "RST_STREAM of a wrong size": Row("6.4", OPEN + frame(RST_STREAM, bytes(3), stream=1), "connection", (SIZE,)),
    "SETTINGS on a stream": Row("6.5", frame(SETTINGS, stream=1), "connection"),
    "SETTINGS of a wrong size": Row("6.5", frame(SETTINGS, bytes(5)), "connection", (SIZE,)),
    "SETTINGS acknowledgement with a payload": Row("6.5", frame(SETTINGS, bytes(6), flags=ACK), "connection", (SIZE,)),
    "ENABLE_PUSH of 2": Row("6.5.2", settings(2, 2), "connection"),
    "INITIAL_WINDOW_SIZE of 2^31": Row("6.5.2", settings(4, 1 << 31), "connection", (FLOW,)),
    "MAX_FRAME_SIZE of 16383": Row("6.5.2", settings(5, 16383), "connection"),
    "MAX_FRAME_SIZE of 2^24": Row("6.5.2", settings(5, 1 << 24), "connection"),
    "an unknown setting": Row("6.5.2", settings(0xABC, 7), "none"),
    "PUSH_PROMISE from a client": Row("8.4", OPEN + frame(PUSH_PROMISE, bytes(4), flags=END_HEADERS, stream=1), "connection"),
    "PING on a stream": Row("6.7", frame(PING, bytes(8), stream=1), "connection"),
    "PING of a wrong size": Row("6.7", frame(PING, bytes(7)), "connection", (SIZE,)),
    "GOAWAY on a stream": Row("6.8", frame(GOAWAY, bytes(8), stream=1), "connection"),
    "WINDOW_UPDATE of 0 on a stream": Row("6.9", OPEN + window(0, 1), "stream"),
    "WINDOW_UPDATE of 0 on the connection": Row("6.9", window(0), "connection"),
    "WINDOW_UPDATE of a wrong size": Row("6.9", frame(WINDOW_UPDATE, bytes(3)), "connection", (SIZE,)),
    "a window of the connection past 2^31-1": Row("6.9.1", window((1 << 31) - 1), "connection", (FLOW,)),
    "a window of a stream past 2^31-1": Row("6.9.1", OPEN + window((1 << 31) - 1, 1), "stream", (FLOW,)),
    "a window past 2^31-1 by SETTINGS": Row("6.9.2", OPEN + window(1 << 30, 1) + settings(4, (1 << 31) - 1), "connection", (FLOW,)),
    "DATA past the window": Row("6.9.1", WATCH + frame(DATA, bytes(16384), stream=1) * 9, "stream", (FLOW,)),
    "an upper-case field name": Row("8.2.1", headers([*PSEUDO, *PLAIN, ("X-Upper", "x")]), "stream"),
    "a field name with a space": Row("8.2.1", headers([*PSEUDO, *PLAIN, ("x y", "x")]), "stream"),
    "a field value with a line feed": Row("8.2.1", headers([*PSEUDO, *PLAIN, ("x", "a\nb")]), "stream"),
    "a field value with a NUL": Row("8.2.1", headers([*PSEUDO, *PLAIN, ("x", "a\0b")]), "stream"),
    "a field of the connection": Row("8.2.2", headers([*PSEUDO, *PLAIN, ("connection", "close")]), "stream"),
    "transfer-encoding": Row("8.2.2", headers([*PSEUDO, *PLAIN, ("transfer-encoding", "chunked")]), "stream"),
    "te that is not trailers": Row("8.2.2", headers([*PSEUDO, ("te", "gzip"), *PLAIN[1:]]), "stream"),
    "a pseudo-header after a field": Row("8.3", headers([*PLAIN, *PSEUDO]), "stream"),
    "an unknown pseudo-header": Row("8.3", headers([*PSEUDO, (":new", "x"), *PLAIN]), "stream"),
    "a pseudo-header of responses": Row("8.3", headers([*PSEUDO, (":status", "200"), *PLAIN]), "stream"),
    "a pseudo-header that comes twice": Row("8.3.1", headers([*PSEUDO, PSEUDO[2], *PLAIN]), "stream"),
    "no :method": Row("8.3.1", headers([*PSEUDO[1:], *PLAIN]), "stream"),
    "no :scheme": Row("8.3.1", headers([PSEUDO[0], *PSEUDO[2:], *PLAIN]), "stream"),
    "no :path": Row("8.3.1", headers([*PSEUDO[:2], PSEUDO[3], *PLAIN]), "stream"),
    "an empty :path": Row("8.3.1", headers([*PSEUDO[:2], (":path", ""), PSEUDO[3], *PLAIN]), "stream"),
    "trailers with a pseudo-header": Row("8.1", OPEN + headers([(":path", "/")], flags=5), "stream"),
    "trailers without END_STREAM": Row("8.1", OPEN + headers([("x", "y")]), "stream"),
    "less than content-length": Row(
        "8.1.1", headers([*PSEUDO, *PLAIN, ("content-length", "9")]) + frame(DATA, b"x", flags=1, stream=1), "stream"
    ),
    "more than content-length": Row(
        "8.1.1", headers([*PSEUDO, *PLAIN, ("content-length", "1")]) + frame(DATA, b"xyz", stream=1), "stream"
    ),
    "content-length that is no number": Row("8.1.1", headers([*PSEUDO, *PLAIN, ("content-length", "x")]), "stream"),
}

ENDS_THE_CONNECTION = {
    "a frame longer than SETTINGS_MAX_FRAME_SIZE",
}
"""To skip the rest of it, the server would have to read it: 16 MiB of what nobody wants."""


class Answer(NamedTuple):
    scope: str
    code: int


@asynccontextmanager
async def connected(running: Running) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = running.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=client_context(running), server_hostname="localhost")
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer(running: Running, sent: bytes) -> Answer:
    """How the server answers these frames: with the first GOAWAY or RST_STREAM that tells an error, or it goes on."""
    async with connected(running) as (reader, writer):
        writer.write(PREFACE + frame(SETTINGS) + sent)
        writer.write(frame(PING, PROBE))
        told = Answer("none", 0)
        with fail_after(10):
            while True:
                try:
                    head = await reader.readexactly(9)
                    payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                except (asyncio.IncompleteReadError, OSError):
                    return told if told.scope != "none" else Answer("lost without a word", 0)
                if head[3] == GOAWAY:
                    return Answer("connection", int.from_bytes(payload[4:8], "big"))
                if head[3] == RST_STREAM and told.scope == "none" and (code := int.from_bytes(payload, "big")):
                    told = Answer("stream", code)
                if head[3] == PING and head[4] & ACK and payload == PROBE:
                    writer.write(frame(PING, AGAIN))  # the first one may be answered before what came with it
                if head[3] == PING and head[4] & ACK and payload == AGAIN:
                    return told


async def each(running: Running, report: Callable[[str, Answer], None]) -> None:
    limiter = anyio.CapacityLimiter(4)

    async def one(name: str, row: Row) -> None:
        async with limiter:
            report(name, await answer(running, row.sent))

    async with anyio.create_task_group() as tasks:
        for name, row in TABLE.items():
            tasks.start_soon(one, name, row)


async def test_every_error_is_answered_as_the_rfc_says(tmp_path: Path) -> None:
    answers: dict[str, Answer] = {}
    async with serving(tmp_path, max_streams_per_connection=4) as running:
        await each(running, answers.__setitem__)
        assert await running.runner.list() == []
    allowed = {
        name: {Answer(scope, code) for code in row.codes for scope in {row.scope, "connection"} if row.scope != "none"}
        or {Answer("none", 0)}
        for name, row in TABLE.items()
    }
    wrong = {name: (TABLE[name].section, got, allowed[name]) for name, got in answers.items() if got not in allowed[name]}
    assert wrong == {}
    assert {
        name for name, got in answers.items() if TABLE[name].scope == "stream" and got.scope == "connection"
    } == ENDS_THE_CONNECTION


@pytest.mark.parametrize("preface", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", PREFACE[:-1] + b"x"], ids=["HTTP/1.1", "almost"])
async def test_who_begins_otherwise_is_told_protocol_error(tmp_path: Path, preface: bytes) -> None:
    async with serving(tmp_path) as running, connected(running) as (reader, writer):
        writer.write(preface)
        with fail_after(10):
            data = await reader.read()
        assert data.endswith(b"Invalid HTTP/2 preamble.")
