"""A client that goes no further in its TLS handshake than it is told to, and what nobody may leave to the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self


class Handshake:
    """One connection, by hand."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.sent = 0
        """Bytes of the handshake."""
        self._unsent, self._done = b"", False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    async def connect(self, address: str) -> Self:
        host, _, port = address.rpartition(":")
        self.reader, self.writer = await asyncio.open_connection(host, int(port))
        return self

    async def send(self, most: int) -> None:
        """So many more bytes of a client's part, or all that are left of it; the server's answers are read as they are needed."""
        while most and (self._unsent or not self._done):
            if self._unsent:
                part, self._unsent = self._unsent[:most], self._unsent[most:]
                self.writer.write(part)
                self.sent, most = self.sent + len(part), most - len(part)
                continue
            with suppress(ssl.SSLWantReadError):
                self.tls.do_handshake()
                self._done = True
            self._unsent = self._outgoing.read()
            if not self._unsent and not self._done:
                answer = await self.reader.read(65536)
                if not answer:
                    raise ConnectionResetError
                self._incoming.write(answer)

    def vanish(self, *, reset: bool = False) -> None:
        """Close, by a reset or as a process that ends does."""
        if reset:
            sock: socket.socket = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fails for what is left unclosed inside."""
    found: list[str] = []

    def note(unraisable: Any) -> None:
        found.append(str(unraisable.exc_value))

    gc.collect()  # what others have left is told to them
    hook, sys.unraisablehook = sys.unraisablehook, note
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook = hook
    assert not found
