"""TLS on an accepted connection, and how many of them there may be.

asyncio drops the alert of a handshake that fails (https://github.com/python/cpython/issues/98078) and tells nobody of it. So the
listening socket is a plain one, and a subclass of asyncio's own TLS protocol sits on each connection: it sends the alert, logs the
address and the reason, and keeps count.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from asyncio import sslproto
from collections.abc import Callable
from typing import Any, cast

__all__ = ["Listener", "Refused", "TlsConnection", "verified_chain"]

logger = logging.getLogger(__name__)


class Listener:
    """The connections of one listening socket: made, or still in their handshake."""

    def __init__(
        self,
        context: ssl.SSLContext,
        admit: Callable[[list[bytes]], tuple[Any, str]],
        failed: Callable[[str, str], object],
        app_protocol: Callable[[], asyncio.Protocol],
        *,
        max_connections: int,
        max_pending: int,
        handshake_timeout: float,
        shutdown_timeout: float,
    ) -> None:
        """`admit` is given a client's verified certificates, its own first, DER: who it is, and why it may not be served, or "".
        `failed` is given the address of a handshake that failed, and the reason.

        `app_protocol` makes what speaks on a connection whose peer has been authenticated. Times are seconds.
        """
        self.context = context
        self.admit = admit
        self._failed = failed
        self.handshake_timeout = handshake_timeout
        self.shutdown_timeout = shutdown_timeout
        self.pending: dict[TlsConnection, None] = {}
        """In the order in which they came."""
        self.live: set[TlsConnection] = set()
        self._app_protocol = app_protocol
        self._max_connections = max_connections
        self._max_pending = max_pending
        self._refusing = False

    def __repr__(self) -> str:
        return f"<Listener {len(self.live)} live, {len(self.pending)} pending>"

    def accept(self) -> asyncio.BaseProtocol:
        """The protocol of the connection that has just come; a protocol factory for `loop.create_server`."""
        if len(self.live) >= self._max_connections:
            self._tell_refusing("max_connections", self._max_connections, "connections")
            return Refused()
        if len(self.pending) >= self._max_pending:
            self._tell_refusing("max_pending_handshakes", self._max_pending, "handshakes")
            self._give_way()
        else:
            self._refusing = False
        connection = TlsConnection(self, self._app_protocol())
        self.pending[connection] = None
        return connection

    def _give_way(self) -> None:
        """Drop the oldest that has said nothing, else the oldest: an honest handshake is over within milliseconds, so who is in
        it the longest is the least likely to be one. Refusing the newest would let a few silent peers keep everybody out.
        """
        silent = (connection for connection in self.pending if not connection.heard)
        oldest = next(silent, None) or next(iter(self.pending))
        del self.pending[oldest]
        oldest.abort()

    def _tell_refusing(self, bound: str, most: int, what: str) -> None:
        if not self._refusing:  # once, not for each connection of a flood
            logger.warning("dropping connections: there are %d %s (%s)", most, what, bound)
        self._refusing = True

    def tell_failed(self, peername: Any, reason: str) -> None:
        """Log and audit a handshake that failed."""
        logger.warning("TLS handshake with %s failed: %s", address_of(peername), reason)
        self._failed(address_of(peername), reason)

    def abort(self) -> None:
        """Drop every connection at once."""
        for connection in [*self.pending, *self.live]:
            connection.abort()


class Refused(asyncio.Protocol):
    """A connection too many: closed before it costs anything."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


class TlsConnection(sslproto.SSLProtocol):
    """The server's side of TLS on one connection. Overrides some methods of asyncio's, the same in Python 3.11 to 3.13."""

    max_size = 16 * 1024
    """Bytes of the read buffer that each connection has; asyncio's 256 KiB are most of what an idle connection costs. Requests are
    small, and one record of TLS is this long at most (RFC 8446 section 5.1)."""

    def __init__(self, listener: Listener, app_protocol: asyncio.Protocol) -> None:
        timeouts: Any = {"ssl_handshake_timeout": listener.handshake_timeout, "ssl_shutdown_timeout": listener.shutdown_timeout}
        nobody: Any = None
        super().__init__(asyncio.get_running_loop(), app_protocol, listener.context, waiter=nobody, server_side=True, **timeouts)
        cast(
            "Any", self
        )._ssl_buffer = bytearray()  # asyncio makes another when the peer says something; most of a flood never does
        self._listener = listener
        self._socket: asyncio.Transport | None = None
        self.heard = False
        """Whether the peer has said anything."""
        self.client: Any = None
        """Who it is, once it is known."""
        self.dismissed = False
        self.refusal = ""
        """Why this client may not be served any more, once that is so."""
        self._address: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._socket = transport
        self._address = transport.get_extra_info("peername")
        super().connection_made(transport)

    def buffer_updated(self, nbytes: int) -> None:
        self.heard = True
        super().buffer_updated(nbytes)

    def abort(self) -> None:
        """Close without a word."""
        if self._socket is not None:
            self._socket.abort()

    def _on_handshake_complete(self, handshake_exc: BaseException | None) -> None:
        self._listener.pending.pop(self, None)
        if handshake_exc is None:
            self._listener.live.add(self)
            connection = getattr(self, "_sslobj")  # noqa: B009 - typeshed does not know it
            self.client, self.refusal = self._listener.admit(verified_chain(connection))
            self._extra["connection"] = self
        else:
            self._listener.tell_failed(self._address, reason_of(handshake_exc))
            flush: Callable[[], None] = getattr(self, "_process_outgoing")  # noqa: B009 - typeshed does not know it
            flush()  # Order: the alert, before the transport is closed without it.
        super()._on_handshake_complete(handshake_exc)

    def _check_handshake_timeout(self) -> None:
        if self in self._listener.pending:
            seconds = self._listener.handshake_timeout
            self._listener.tell_failed(self._address, f"not done within {seconds:g} s")
        super()._check_handshake_timeout()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._listener.pending.pop(self, None)
        self._listener.live.discard(self)
        super().connection_lost(exc)


def verified_chain(connection: Any) -> list[bytes]:
    """The peer's certificates, leaf first, up to the CA that it was accepted by, DER; public in Python from 3.13 on."""
    if hasattr(connection, "get_verified_chain"):
        return list(connection.get_verified_chain())
    der = 2  # _ssl.ENCODING_DER
    return [each.public_bytes(der) for each in connection._sslobj.get_verified_chain()]


def reason_of(exc: BaseException) -> str:
    """OpenSSL's words for why it refused a peer."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return exc.verify_message
    if isinstance(exc, ssl.SSLError) and exc.reason:
        return exc.reason.replace("_", " ").lower()
    if isinstance(exc, ConnectionError):
        return "the client closed the connection: it may not accept the server's certificate"
    return str(exc)


def address_of(peername: Any) -> str:
    """HOST:PORT of a socket's peer name, for messages."""
    if not isinstance(peername, tuple):
        return "an unknown address"
    host, port = peername[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
