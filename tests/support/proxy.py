"""A TCP proxy that cuts connections: at a byte of what it passes on to the client, or when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

__all__ = ["Proxy", "proxy_to"]

RESET = struct.pack("ii", 1, 0)
"""For SO_LINGER: closing sends a reset instead of an end-of-file (socket(7))."""
SLOW = 4096
"""Bytes that a slow line takes at once."""


class Proxy:
    """`address` is where clients connect. What goes to the server is never cut short by itself."""

    def __init__(self, target: str, budget: Callable[[], int | None], rate_up: float | None) -> None:
        self.target = target
        """May be changed: new connections go there."""
        self.cuts = 0
        self.passed = 0
        """Bytes that have come from the server and were passed on."""
        self.address = ""
        self.refusing = False
        """Whether new connections are cut at once."""
        self.muted = False
        """Whether what comes from the server is thrown away."""
        self.idle: float | None = None
        """Seconds without a byte from the server after which a connection is cut."""
        self.rate: float | None = None
        """Bytes in a second that are taken from the server, and no more than a few are held."""
        self.rate_up = rate_up
        """The same of clients."""
        self.accepted = 0
        self._budget = budget
        self._connections: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        """Cut every connection now."""
        for connection in self._connections:
            connection.cancel()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.accepted += 1
        try:
            if not self.refusing:
                await self._pass(reader, writer)
        except asyncio.CancelledError:
            self.cuts += 1  # by `cut`, or at the end of the test
        finally:
            self._connections.discard(task)
            _reset(writer)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        own = socket.socket()
        if self.rate is not None:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW)
        try:
            own.connect((host, int(port)))
            from_server, to_server = await asyncio.open_connection(sock=own)
        except OSError:
            own.close()
            return  # the server is away: its clients see a connection that is closed
        up = asyncio.create_task(self._up(reader, to_server))
        try:
            if await self._down(from_server, writer):
                self.cuts += 1
        finally:
            to_server.transport.abort()  # Order: first, because the wait may be cancelled by a second cut
            up.cancel()
            await asyncio.wait([up])

    async def _down(self, from_server: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Until the end of file, an error, or the last byte of the budget: then True."""
        left = self._budget()
        with contextlib.suppress(OSError):
            while data := await self._read(from_server):
                if self.muted:
                    continue
                part = data if left is None else data[:left]
                writer.write(part)
                self.passed += len(part)
                await writer.drain()
                if self.rate is not None:
                    await asyncio.sleep(len(part) / self.rate)
                if left is not None:
                    left -= len(part)
                    if left == 0:
                        return True
            return data is None
        return False

    async def _read(self, from_server: asyncio.StreamReader) -> bytes | None:
        """What comes next; None if nothing does for too long."""
        try:
            async with asyncio.timeout(self.idle):
                return await from_server.read(65536 if self.rate is None else SLOW)
        except TimeoutError:
            return None

    async def _up(self, reader: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536 if self.rate_up is None else SLOW):
                to_server.write(data)
                await to_server.drain()
                if self.rate_up is not None:
                    await asyncio.sleep(len(data) / self.rate_up)
            # The client is gone; so that the other direction ends as well:
            to_server.transport.abort()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


@asynccontextmanager
async def proxy_to(
    target: str, budget: Callable[[], int | None] = lambda: None, rate_up: float | None = None
) -> AsyncIterator[Proxy]:
    """A proxy to HOST:PORT; `budget` gives for each connection the bytes from the server after which it is cut, None for never."""
    proxy = Proxy(target, budget, rate_up)
    listening = socket.create_server(("127.0.0.1", 0))
    if rate_up is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW)  # before anyone connects, who is told how much it takes
    server = await asyncio.start_server(proxy.accept, sock=listening, limit=SLOW)
    proxy.address = f"127.0.0.1:{listening.getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
        while proxy._connections:
            await asyncio.wait(list(proxy._connections))
