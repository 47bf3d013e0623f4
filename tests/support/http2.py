"""A peer that speaks HTTP/2 by hand, so that it can do what no gRPC library does."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import anyio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)

from tests.support.server import Running

HEADERS = (
    (":method", "POST"),
    (":scheme", "https"),
    (":authority", "localhost"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


def framed(message: bytes, compressed: bool = False) -> bytes:
    """A gRPC message with its prefix."""
    return bytes([compressed]) + len(message).to_bytes(4, "big") + message


class RawPeer:
    """One connection; `events` holds what came and was not asked for yet."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.lost = False

    async def open(self) -> Self:
        self.h2.initiate_connection()
        await self.flush()
        return self

    async def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())
        try:
            await self.writer.drain()
        except OSError:
            self.lost = True

    async def request(self, path: str, data: bytes = b"", *, end: bool = True, headers: tuple[tuple[str, str], ...] = ()) -> int:
        """Send a call's headers and data; the stream's id. Data must fit into the server's window."""
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, [(":path", path), *HEADERS, *headers], end_stream=end and not data)
        for at in range(0, len(data), 16384):
            part = data[at : at + 16384]
            self.h2.send_data(stream, part, end_stream=end and at + len(part) == len(data))
        await self.flush()
        return stream

    async def receive(self, *, read: bool = True) -> list[Event]:
        """What comes next; empty, and `lost`, when the server has closed the connection. `read` gives the window back."""
        try:
            data = await self.reader.read(65536)
        except (OSError, ssl.SSLError):
            data = b""
        if not data:
            self.lost = True
            return []
        events = self.h2.receive_data(data)
        for event in events:
            if read and isinstance(event, DataReceived):
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        await self.flush()
        return events

    def pause(self) -> None:
        """Read nothing from the socket any more."""
        assert isinstance(self.writer.transport, asyncio.Transport)
        self.writer.transport.pause_reading()

    async def status(self, stream: int, *, read: bool = True) -> tuple[str, str]:
        """The gRPC status and message that a call ends with; ("", "") if it is reset or the connection lost instead.

        Without `read` nothing of the window is given back, and the answer has to fit into it.
        """
        with anyio.fail_after(10):
            while not self.lost:
                for event in await self.receive(read=read):
                    if isinstance(event, ResponseReceived | TrailersReceived) and event.stream_id == stream:
                        headers = {_text(name): _text(value) for name, value in event.headers}
                        if "grpc-status" in headers:
                            return headers["grpc-status"], headers.get("grpc-message", "")
                    elif isinstance(event, StreamReset | StreamEnded) and event.stream_id == stream:
                        return "", ""
        return "", ""

    async def wait_lost(self) -> None:
        """Until the server has closed the connection."""
        with anyio.fail_after(10):
            while not self.lost:
                if any(isinstance(event, ConnectionTerminated) for event in await self.receive()):
                    return


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def client_context(running: Running, user: str = "admin", alpn: str | None = "h2") -> ssl.SSLContext:
    """As this user; without ALPN if that is None."""
    context = ssl.create_default_context(cafile=running.authority.pem)
    pair = running.pair(user, user)
    context.load_cert_chain(pair.cert, pair.key)
    if alpn:
        context.set_alpn_protocols([alpn])
    return context


@asynccontextmanager
async def raw_peer(running: Running, user: str = "admin", alpn: str | None = "h2") -> AsyncIterator[RawPeer]:
    """A connection as this user, with HTTP/2's preface sent."""
    host, _, port = running.address.rpartition(":")
    # A small buffer of the kernel's: a peer that does not read is felt soon.
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect((host, int(port)))
    reader, writer = await asyncio.open_connection(sock=raw, ssl=client_context(running, user, alpn), server_hostname="localhost")
    try:
        yield await RawPeer(reader, writer).open()
    finally:
        writer.transport.abort()
