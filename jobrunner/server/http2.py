"""What one authenticated peer may do on its connection: grpclib's HTTP/2 protocol with the bounds that it lacks.

headers too long        RESOURCE_EXHAUSTED; four times as long: the end of the connection
calls too many at once  REFUSED_STREAM, which clients know as not begun
much at once            handled in pieces, and a piece of each user's in turn
frames in a flood, answers that are not read, frames too long, calls reset in a flood: the end of the connection
errors of the protocol  RST_STREAM, or GOAWAY, with the code of RFC 9113; GOAWAY's debug data is the reason
frames of unknown types are ignored (RFC 9113 section 5.5)
every call is answered: never not at all

What is bounded of one call is in `stream`; how much one user may do in a second is in `limits`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

from grpclib.config import Configuration
from grpclib.protocol import EventsProcessor, H2Protocol
from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h2.events import RequestReceived, TrailersReceived, UnknownFrameReceived
from h2.exceptions import ProtocolError

from jobrunner.errors import LimitReached
from jobrunner.server.auth import who
from jobrunner.server.calls import CallHandler
from jobrunner.server.connection import Http2, checked_headers
from jobrunner.server.frames import FrameMeter, TooMuch
from jobrunner.server.limits import Bucket
from jobrunner.server.listening import address_of
from jobrunner.server.shared import ServerConnection, Shared
from jobrunner.server.stream import ServerStream
from jobrunner.server.turns import Line
from jobrunner.wire.keepalive import KEEPALIVE

__all__ = ["CONFIGURATION", "MAX_UNSENT", "ServerProtocol"]

CONFIGURATION = Configuration(
    **KEEPALIVE,
    http2_connection_window_size=512 * 1024,
    http2_stream_window_size=128 * 1024,
)
"""What a peer can make the server hold before a handler reads it is small."""
MAX_UNSENT = 256 * 1024
"""Bytes that TLS holds of what a peer has not read yet, beside what the kernel does; half of asyncio's own bound."""


class ServerProtocol(H2Protocol):
    """One connection whose peer's certificate has been accepted."""

    transport: asyncio.Transport
    handler: CallHandler
    user = ""
    """The CN of the client's certificate, "" if there is not exactly one."""
    frames: Bucket

    def __init__(self, handler: CallHandler, h2_config: H2Configuration, shared: Shared) -> None:
        super().__init__(handler, CONFIGURATION.__for_server__(), h2_config)
        self.shared = shared
        self._unread = 0
        self._pieces: deque[bytes] = deque()
        """What has come and waits for its turn. Nothing is read meanwhile."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As grpclib's, with an HTTP/2 connection of our own."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(MAX_UNSENT)
        bounds = self.shared.bounds
        window = self.config.http2_stream_window_size
        limits = {"max_streams": bounds.max_streams_per_connection, "max_header_size": bounds.max_header_size}
        self.http2 = Http2(self.h2_config, stream_window=window, **limits)
        self.http2.initiate_connection()
        self.http2.increment_flow_control_window(self.config.http2_connection_window_size - 65535)
        self._meter = FrameMeter(self.http2.max_inbound_frame_size)
        self.connection = ServerConnection(self.http2, self.transport, config=self.config)
        self.connection.protocol, self.connection.line = self, Line()
        self.connection.flush()
        self.connection.initialize()
        self.processor = EventsProcessor(self.handler, self.connection)
        processors: dict[type, Any] = self.processor.processors
        processors[UnknownFrameReceived] = lambda event: None
        processors[RequestReceived] = self._request_received
        processors[TrailersReceived] = self._trailers_received
        self.user = _user_of(transport)
        self.frames = self.shared.frames.of(self.user)
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self.cut("it does not speak HTTP/2 (ALPN h2)", "alpn")
            return
        most, bound = bounds.max_connections_per_user, "max_connections_per_user"
        if sum(other.user == self.user for other in self.shared.live) >= most:
            self.end(f'cannot connect: user "{self.user}" has {most} connections ({bound})', bound)
        self.shared.live.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._pieces.clear()
        self.shared.live.discard(self)
        super().connection_lost(exc)
        self.shared.changed.set()

    def resume_writing(self) -> None:
        self._unread = 0
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # what was under way when the connection was ended
        waiting = bool(self._pieces)
        try:
            costly, pieces = self._meter.pieces(data)
            if self.frames.take(costly):
                raise TooMuch(f"more than {self.frames.per_second:g} small frames a second", self.shared.frames.bound)
        except ProtocolError as exc:
            self._protocol_error(exc)
            return
        self._pieces.extend(pieces)
        if not waiting:
            self.shared.turns.take(self.user, self._next_piece)
        if self._pieces:
            self.transport.pause_reading()

    def _next_piece(self) -> None:
        if not self._pieces:
            return  # the connection is lost
        try:
            self._received(self._pieces.popleft())
        except BaseException:
            self.transport.abort()
            raise
        if self.transport.is_closing():
            self._pieces.clear()
        if self._pieces:
            self.shared.turns.take(self.user, self._next_piece)
        else:
            # Also of one that is closing: TLS, which has met the end of file meanwhile, closes only when it is read from.
            self.transport.resume_reading()

    def _received(self, data: bytes) -> None:
        before = self.transport.get_write_buffer_size()
        try:
            events = self.connection.feed(data)
        except ProtocolError as exc:
            self._protocol_error(exc)
            return
        self.connection.flush()
        for event in events:
            self.processor.process(event)
        self.connection.flush()
        if self.transport.is_closing():
            return
        # What is written while data comes in are answers to control frames. Output waits for the peer to read; these do not.
        if not self.connection.write_ready.is_set():
            self._unread += max(0, self.transport.get_write_buffer_size() - before)
        if self._unread > self.shared.bounds.max_unread_answers:
            self.cut("it does not read the answers to its control frames (max_unread_answers)", "max_unread_answers")

    def streams(self) -> list[ServerStream]:
        """The calls that are being handled."""
        return [stream for stream in self.processor.streams.values() if isinstance(stream, ServerStream)]

    def go_away(self) -> None:
        """Tell the peer that this connection is over, and close it."""
        if not self.transport.is_closing():
            self.http2.close_connection()
            self.connection.flush()
            self.processor.close("the server is shutting down")

    def end(self, reason: str, cause: str, code: ErrorCodes = ErrorCodes.ENHANCE_YOUR_CALM) -> None:
        """End the connection at once and tell the peer why: `cannot VERB: reason (bound)`, in GOAWAY's debug data.

        `cause` is the bound, or a word for the metrics.
        """
        if self.transport.is_closing():
            return
        self.shared.account.ended(self.who(), reason, cause)
        with suppress(ProtocolError):  # it has been told GOAWAY already
            self.http2.close_connection(code, additional_data=reason.encode()[:1024])
        self.connection.flush()
        self.processor.close(reason)

    def cut(self, reason: str, cause: str) -> None:
        """Without a word to who would not read it."""
        if not self.transport.is_closing():
            self.shared.account.ended(self.who(), reason, cause)
            self.transport.abort()

    def who(self) -> dict[str, str]:
        """The peer, for the audit log."""
        return who(self.transport.get_extra_info("peercert"), address_of(self.transport.get_extra_info("peername")))

    def no_call(self, path: str, reason: str) -> None:
        """A request on it is none."""
        self.shared.account.no_call(self.who(), path, reason)

    def _protocol_error(self, exc: ProtocolError) -> None:
        cause = exc.bound if isinstance(exc, TooMuch) else "protocol"
        self.end(f"cannot go on: {str(exc) or type(exc).__name__}", cause, exc.error_code)

    def _request_received(self, event: RequestReceived) -> None:
        bounds, account = self.shared.bounds, self.shared.account
        # A call that is reset is handled to its end all the same: without this bound a flood of them would pile up.
        if self.handler.unfinished() > 4 * bounds.max_streams_per_connection:
            self.cut("it resets calls faster than they can be ended", "resets")
            return
        assert event.stream_id is not None
        try:
            headers = checked_headers(event.headers or ())
        except ProtocolError as exc:
            self._malformed(event.stream_id, exc)
            return
        path = dict(headers).get(":path", "")
        known, most = self.http2.streams, bounds.max_streams_per_connection
        if sum(number in known and not known[number].closed for number in self.processor.streams) >= most:
            account.refused(self.who(), "max_streams_per_connection", f"it has {most} calls at once", path)
            self.http2.reset_stream(event.stream_id, ErrorCodes.REFUSED_STREAM)
            return
        stream = ServerStream(self.connection, event.stream_id, bounds)
        stream.refusal = self._refusal(headers)
        if stream.refusal is not None:
            account.refused(self.who(), stream.refusal.bound, stream.refusal.reason, path)
        release_stream = self.processor.register(stream)
        self.shared.began(self.user)
        counted = True

        def release() -> None:
            nonlocal counted
            if stream.id in self.processor.streams:
                release_stream()
            if counted:
                stream.let_go()
                self.shared.over(self.user)
                counted = False
            self.shared.changed.set()

        self.handler.accept(stream, headers, release)

    def _refusal(self, headers: Sequence[tuple[str, str]]) -> LimitReached | None:
        """Why a call is not looked at, if it is not."""
        bounds, calls = self.shared.bounds, self.shared.calls[self.user]
        size = sum(len(name) + len(value) + 32 for name, value in headers)
        if size > bounds.max_header_size:
            reason = f"its headers of {size} bytes are longer than {bounds.max_header_size}"
            return LimitReached("read request", "max_header_size", reason)
        if calls >= bounds.max_calls_per_user:
            return LimitReached("read request", "max_calls_per_user", f'user "{self.user}" has {calls} calls at once')
        return None

    def _trailers_received(self, event: TrailersReceived) -> None:
        """Of a request they say nothing that matters here, but may be malformed."""
        assert event.stream_id is not None
        try:
            checked_headers(event.headers or (), trailers=True)
        except ProtocolError as exc:
            self._malformed(event.stream_id, exc)

    def _malformed(self, stream_id: int, exc: ProtocolError) -> None:
        self.no_call("", f"the request is malformed: {exc}")
        if stream_id in self.http2.streams:
            self.http2.reset_stream(stream_id, ErrorCodes.PROTOCOL_ERROR)
        stream = self.processor.streams.get(stream_id)
        if stream is not None:
            stream.__terminated__("malformed trailers")


def _user_of(transport: asyncio.BaseTransport) -> str:
    """The CN of the certificate, "" if there is not exactly one: those are one user, who may do nothing."""
    subject = (transport.get_extra_info("peercert") or {}).get("subject", ())
    names = [value for rdn in subject for key, value in rdn if key == "commonName"]
    return str(names[0]) if len(names) == 1 else ""
