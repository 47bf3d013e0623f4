"""One HTTP/2 connection to a server: grpclib's channel with this project's windows, keepalive, and a diagnosis of why it broke.

Under TLS 1.3 a client's handshake is over before the server has looked at the client's certificate, so a refused certificate is
seen as a connection that is lost after it was made. What tells it from any other loss: no byte of HTTP/2 has come (a server's
SETTINGS come first, and only after the certificate was accepted), and often a TLS alert that names the reason.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, cast

import anyio
from grpclib.client import Channel, Handler
from grpclib.config import Configuration
from grpclib.protocol import EventsProcessor, H2Protocol
from h2.events import (
    AlternativeServiceAvailable,
    ConnectionTerminated,
    DataReceived,
    InformationalResponseReceived,
    StreamEnded,
    UnknownFrameReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

from jobrunner.client.dial import dial
from jobrunner.client.frames import FrameBuffer
from jobrunner.wire.keepalive import KEEPALIVE, PatientConnection

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from grpclib.encoding.base import CodecBase
    from h2.config import H2Configuration

__all__ = ["ClientChannel", "ClientProtocol"]

MAX_FRAME = 256 * 1024
STREAM_WINDOW = 1024 * 1024
CONNECTION_WINDOW = 128 * STREAM_WINDOW
"""More than all the streams have that a server allows on one connection (100): output that nobody reads stops no other call."""
CONNECT_TIMEOUT = 10.0
CLOSE_TIMEOUT = 0.25
PROBE_TIMEOUT = 2.0

_CONFIGURATION = Configuration(
    **KEEPALIVE,
    http2_connection_window_size=CONNECTION_WINDOW,
    http2_stream_window_size=STREAM_WINDOW,
)


class ClientConnection(PatientConnection):
    """grpclib's, which may be gone before an answer has been taken."""

    def ack(self, stream_id: int, size: int) -> None:
        """What is taken from an answer after the connection has gone needs no acknowledgement."""
        if not self.is_closing():
            super().ack(stream_id, size)


class ClientProtocol(H2Protocol, asyncio.BufferedProtocol):
    """Asks for large frames, keeps answers that came whole, and remembers how the connection was lost."""

    received_at: float | None = None
    """When the server first sent something, by the loop's clock: it has accepted the client's certificate."""
    gone_at: float | None = None
    """When the connection was lost."""
    lost: BaseException | None = None
    """What the transport said when it was lost; None also for a quiet end-of-file."""

    told: tuple[int, str] | None = None
    """The code and the reason with which the server has ended the connection (GOAWAY), if it has."""

    connection: ClientConnection
    processor: EventsProcessor
    transport: asyncio.Transport | None = None

    def __init__(self, handler: Handler, config: Configuration, h2_config: H2Configuration, reached: Callable[[], None]) -> None:
        """`reached` is called when the server first sends something."""
        super().__init__(handler, config, h2_config)
        self._reached = reached
        self._frames = FrameBuffer(MAX_FRAME)
        self.closed = asyncio.Event()
        """Set when the connection is lost, and the socket is closed."""

    @property
    def received(self) -> bool:
        return self.received_at is not None

    @property
    def gone(self) -> bool:
        return self.gone_at is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport = cast("asyncio.Transport", transport)
        self.connection = ClientConnection.instead_of(self.connection)
        self.processor = EventsProcessor(self.handler, self.connection)
        h2 = self.connection._connection
        h2.update_settings({SettingCodes.MAX_FRAME_SIZE: MAX_FRAME, SettingCodes.ENABLE_PUSH: 0})
        # h2 applies the new size only after the bytes that hold the server's acknowledgement: a large frame in the same
        # read would be refused.
        h2.max_inbound_frame_size = MAX_FRAME
        self.connection.flush()
        # RFC 9113 sections 4.1 and 8.1, RFC 7838 section 4: these may be ignored; grpclib would raise.
        processors: dict[type, Any] = self.processor.processors
        for kind in (UnknownFrameReceived, InformationalResponseReceived, AlternativeServiceAvailable):
            processors[kind] = lambda event: None
        processors[DataReceived] = self._data_received
        processors[StreamEnded] = self._stream_ended
        processors[ConnectionTerminated] = self._terminated

    def _terminated(self, event: ConnectionTerminated) -> None:
        self.told = int(event.error_code or 0), (event.additional_data or b"").decode(errors="replace")
        self.processor.process_connection_terminated(event)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._frames.room()

    def buffer_updated(self, nbytes: int) -> None:
        """As grpclib's `data_received`, frame by frame."""
        if self.received_at is None:
            self.received_at = asyncio.get_running_loop().time()
            self._reached()
        self._frames.add(nbytes)
        try:
            for events in self._frames.receive(self.connection._connection):
                self.connection.flush()
                for event in events:
                    self.processor.process(event)
                if self.connection.is_closing():
                    return
                self.connection.flush()
        except ProtocolError as exc:
            self.processor.close(f"Protocol error: {exc}")

    def _data_received(self, event: DataReceived) -> None:
        """A frame without a byte is no end of the answer (RFC 9113 section 6.1), as grpclib has it."""
        if event.flow_controlled_length:
            self.processor.process_data_received(event)

    def _stream_ended(self, event: StreamEnded) -> None:
        """A call whose answer is here to its end has nothing to fear from the connection any more.

        grpclib ends all calls with the connection, also those whose last message is received and not yet taken: a server that
        shuts down sends that message and its GOAWAY at once (RFC 9113 section 6.8 lets such calls complete).
        """
        self.processor.process_stream_ended(event)
        stream = self.processor.streams.get(event.stream_id)
        if stream is None:
            return
        if stream.trailers is None and "grpc-status" not in dict(stream.headers or ()):  # it has no status, so nobody waits for one
            stream.trailers = []
            stream.trailers_received.set()
        if not stream.closable:  # both sides have ended it, so nothing in it waits for the server
            stream.wrapper = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self.gone_at = asyncio.get_running_loop().time()
        self.lost = exc
        super().connection_lost(exc)
        self.closed.set()


class _FirstByte(asyncio.Protocol):
    """Hears one byte, or how the connection was lost before."""

    transport: asyncio.Transport | None = None
    said = b""
    lost: BaseException | None = None

    def __init__(self) -> None:
        self.over = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.said = self.said or data[:1]
        self.over.set()

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self.over.is_set():
            self.lost = exc
            self.over.set()


class ClientChannel(Channel):
    """A channel to HOST:PORT over mutual TLS. Connects on the first call, and again on the next one after a loss."""

    def __init__(
        self, host: str, port: int, context: ssl.SSLContext, codec: CodecBase, reached: Callable[[], None] = lambda: None
    ) -> None:
        """`reached` is called whenever a connection has been made and the server has accepted the client's certificate."""
        super().__init__(host, port, ssl=context, codec=codec, config=_CONFIGURATION)
        self._tls = context
        self.last: ClientProtocol | None = None
        """The newest connection, kept after its loss for the diagnosis."""
        self.reached = False
        """Whether the server has been reached once."""
        self.tried_at = math.inf
        """When that was first tried, by the loop's clock."""
        self._tell_reached = reached

    def lasted(self, since: float) -> float:
        """For how many seconds after this moment, by the loop's clock, there was a connection; 0 or less for not at all."""
        if self.last is None or self.last.received_at is None:
            return 0.0
        end = asyncio.get_running_loop().time() if self.last.gone_at is None else self.last.gone_at
        return end - max(since, self.last.received_at)

    def _first_byte(self) -> None:
        self.reached = True
        self._tell_reached()

    async def _create_connection(self) -> H2Protocol:
        self.tried_at = min(self.tried_at, self._loop.time())
        protocol = ClientProtocol(Handler(), self._config, self._h2_config, self._first_byte)
        self.last = await dial(self._host, self._port, self._tls, protocol, CONNECT_TIMEOUT)
        return protocol

    async def probe(self) -> bytes:
        """The first byte that the server says to this client's certificate, b"" if it just closes.

        Raises ssl.SSLError for an alert, OSError and TimeoutError. Asked by a connection of its own that sends nothing after the
        handshake: the one that failed had sent the beginning of HTTP/2, and a server that closes with that unread resets the
        connection, so that its alert is lost on the way (RFC 9293 section 3.6.1).
        """
        probe = await dial(self._host, self._port, self._tls, _FirstByte(), PROBE_TIMEOUT)
        assert probe.transport is not None
        try:
            with anyio.fail_after(PROBE_TIMEOUT):
                await probe.over.wait()
        finally:
            probe.transport.abort()
        if probe.lost is not None:
            raise probe.lost
        return probe.said

    async def aclose(self) -> None:
        """Close, and return when the socket is closed: at once if the server answers TLS's goodbye, else after CLOSE_TIMEOUT."""
        self.close()
        if self.last is None:
            return
        with anyio.move_on_after(CLOSE_TIMEOUT):
            await self.last.closed.wait()
        if not self.last.gone and self.last.transport is not None:
            self.last.transport.abort()
            await self.last.closed.wait()
