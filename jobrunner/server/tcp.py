"""TLS on an accepted connection, and how many of them there may be.

asyncio drops the alert of a handshake that fails (https://github.com/python/cpython/issues/98078) and tells nobody of it. So the
listening socket is a plain one, and a subclass of asyncio's own TLS protocol sits on each connection: it sends the alert, tells the
address and the reason, and keeps count. A few handshakes go on in a turn of the loop, and fewer of one address: each costs
milliseconds, and others have to be heard in a flood of them.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio import sslproto
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from jobrunner.server.listening import address_of
from jobrunner.server.turns import Turns

if TYPE_CHECKING:
    from jobrunner.bounds import Bounds
    from jobrunner.server.account import Account

__all__ = ["ACCEPTS", "Listener", "Refused", "TlsConnection", "verified_chain"]


ACCEPTS = 16
"""Connections accepted at once: far fewer than handshakes may be pending, so that who speaks is heard before it has to give way."""
STEPS, STEPS_OF_ALL = 4, 8
"""Of the handshakes of one address, and of all, in a turn of the loop: each has two, of about a millisecond."""


class Listener:
    """The connections of one listening socket: made, or still in their handshake."""

    def __init__(
        self,
        context: ssl.SSLContext,
        admit: Callable[[list[bytes]], tuple[Any, str]],
        account: Account,
        app_protocol: Callable[[], asyncio.Protocol],
        bounds: Bounds,
        shutdown_timeout: float,
    ) -> None:
        """`admit` is given a client's verified certificates, its own first, DER: who it is, and why it may not be served, or "".

        `app_protocol` makes what speaks on a connection whose peer has been authenticated. `shutdown_timeout` is seconds.
        """
        self.context = context
        self.admit = admit
        self.account = account
        self.known = Counter[str]()
        """Addresses from which clients are connected, and how many: a flood from elsewhere does not delay their next connection."""
        self._turns, self._turns_of_known = Turns(STEPS, STEPS_OF_ALL), Turns(STEPS)
        self.handshake_timeout = bounds.handshake_timeout
        self.shutdown_timeout = shutdown_timeout
        self.pending: dict[TlsConnection, None] = {}
        """In the order in which they came."""
        self.live: set[TlsConnection] = set()
        self.open: set[TlsConnection | Refused] = set()
        """All whose socket is not closed yet, whatever has become of them."""
        self._one_left = asyncio.Event()
        self._app_protocol = app_protocol
        self._max_connections = bounds.max_connections
        self._max_pending = bounds.max_pending_handshakes

    def __repr__(self) -> str:
        return f"<Listener {len(self.live)} live, {len(self.pending)} pending>"

    def accept(self) -> asyncio.BaseProtocol:
        """The protocol of the connection that has just come; a protocol factory for `loop.create_server`."""
        if self._full:
            return Refused(self)
        return TlsConnection(self, self._app_protocol())

    @property
    def _full(self) -> bool:
        return len(self.live) >= self._max_connections

    def begins(self, connection: TlsConnection) -> None:
        """Its handshake does: its socket is made, and its address known."""
        self.open.add(connection)
        if len(self.pending) >= self._max_pending:
            self._give_way()
        self.pending[connection] = None

    def turns(self, host: str) -> Turns:
        """In which handshakes of this address go on."""
        return self._turns_of_known if host in self.known else self._turns

    def made(self, connection: TlsConnection) -> bool:
        """Its handshake is over, and its client's certificate accepted. Whether it may stay: others may have been faster."""
        del self.pending[connection]
        if self._full:
            self.refuse(connection.address)
            return False
        self.live.add(connection)
        self.known[connection.host] += 1
        return True

    def refuse(self, address: str) -> None:
        """Tell that a connection from there is one too many."""
        self.account.refused({"address": address}, "max_connections", f"there are {self._max_connections} connections")

    def _give_way(self) -> None:
        """Drop the oldest that has said nothing, else the oldest that is not alone from its address, else the oldest.

        An honest handshake is over within milliseconds, so who is in it the longest is the least likely to be one. Refusing the
        newest would let a few silent peers keep everybody out. Of the newest, who were accepted at once or just before, nothing
        can have been read: they would drop each other.
        """
        to_be_heard = islice(self.pending, max(0, len(self.pending) - 2 * ACCEPTS))
        silent = (connection for connection in to_be_heard if not connection.heard)
        hosts = Counter(connection.host for connection in self.pending)
        crowd = (connection for connection in self.pending if hosts[connection.host] > 1)
        oldest = next(silent, None) or next(crowd, None) or next(iter(self.pending))
        del self.pending[oldest]
        reason = f"there are {self._max_pending} handshakes, and this one has lasted for long"
        self.account.refused({"address": oldest.address}, "max_pending_handshakes", reason)
        oldest.abort()

    def left(self, connection: TlsConnection | Refused) -> None:
        """Its socket is being closed."""
        self.open.discard(connection)
        if isinstance(connection, TlsConnection):
            self.pending.pop(connection, None)
            if connection in self.live:
                self.live.remove(connection)
                self.known -= Counter((connection.host,))  # which forgets who has none
        self._one_left.set()

    async def close(self) -> None:
        """Drop every connection at once; returns when their sockets are closed. Nothing may be accepted any more."""
        for connection in self.open:
            connection.abort()
        while self.open:
            self._one_left.clear()
            await self._one_left.wait()


class Refused(asyncio.Protocol):
    """A connection too many: closed before it costs anything."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._listener.open.add(self)
        self._listener.refuse(address_of(transport.get_extra_info("peername")))
        transport.abort()

    def abort(self) -> None:
        """It is already."""

    def connection_lost(self, exc: BaseException | None) -> None:
        self._listener.left(self)


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
        self._give_up_turn: Callable[[], None] | None = None
        """While its handshake waits to go on."""
        self.heard = False
        """Whether the peer has said anything."""
        self.client: Any = None
        """Who it is, once it is known."""
        self.dismissed = False
        self.refusal = ""
        """Why this client may not be served any more, once that is so."""
        self.address = self.host = "an unknown address"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._socket = transport
        self.address = address_of(transport.get_extra_info("peername"))
        self.host = self.address.rpartition(":")[0]
        self._listener.begins(self)
        # What may have come and not be decrypted, while what came before waits for its turn (`http2`). A record that is not whole
        # is shorter than the lower one, or the rest of it would never be read.
        cast("Any", self)._set_read_buffer_limits(4 * self.max_size, 2 * self.max_size)
        super().connection_made(transport)

    def buffer_updated(self, nbytes: int) -> None:
        self.heard = True
        if self not in self._listener.pending or self._socket is None:
            super().buffer_updated(nbytes)
            return
        self._socket.pause_reading()
        turns, step = self._listener.turns(self.host), partial(self._go_on, nbytes)
        self._give_up_turn = partial(turns.forget, self.host, step)
        turns.take(self.host, step)

    def _go_on(self, nbytes: int) -> None:
        """With the handshake. What has come is still in the buffer, as nothing was read since."""
        self._give_up_turn = None
        if self._socket is None or self._socket.is_closing():
            return
        self._socket.resume_reading()
        try:
            super().buffer_updated(nbytes)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Close without a word."""
        if self._socket is not None:
            self._socket.abort()

    def _on_handshake_complete(self, handshake_exc: BaseException | None) -> None:
        if handshake_exc is None:
            if not self._listener.made(self):
                self.abort()
                return
            connection = getattr(self, "_sslobj")  # noqa: B009 - typeshed does not know it
            self.client, self.refusal = self._listener.admit(verified_chain(connection))
            self._extra["connection"] = self
        else:
            self._listener.pending.pop(self, None)
            self._listener.account.handshake_failed(self.address, reason_of(handshake_exc))
            flush: Callable[[], None] = getattr(self, "_process_outgoing")  # noqa: B009 - typeshed does not know it
            flush()  # Order: the alert, before the transport is closed without it.
        super()._on_handshake_complete(handshake_exc)

    def _check_handshake_timeout(self) -> None:
        if self in self._listener.pending:
            seconds = self._listener.handshake_timeout
            self._listener.account.handshake_failed(self.address, f"not done within {seconds:g} s")
        super()._check_handshake_timeout()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._give_up_turn is not None:
            self._give_up_turn()  # or those who have given way would wait, with all that they hold
            self._give_up_turn = None
        super().connection_lost(exc)
        self._listener.left(self)


def verified_chain(connection: Any) -> list[bytes]:
    """The peer's certificates, leaf first, up to the CA that it was accepted by, DER; public in Python from 3.13 on."""
    if hasattr(connection, "get_verified_chain"):
        return list(connection.get_verified_chain())
    der = 2  # _ssl.ENCODING_DER
    return [each.public_bytes(der) for each in connection._sslobj.get_verified_chain()]


def reason_of(exc: BaseException | type[BaseException]) -> str:
    """OpenSSL's words for why it refused a peer. asyncio gives a class, too."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return exc.verify_message
    if isinstance(exc, ssl.SSLError) and exc.reason:
        return exc.reason.replace("_", " ").lower()
    if isinstance(exc, ConnectionError) or exc is ConnectionResetError:
        return "the client closed the connection: it may not accept the server's certificate"
    return str(exc)
