"""What one authenticated peer may do on its connection: grpclib's HTTP/2 protocol with the bounds that it lacks.

message size            a longer one is RESOURCE_EXHAUSTED before it is buffered
a send without progress ends its stream, or the connection if that is what stalls
control frames          a peer that asks for answers and does not read them is cut
frames too long, streams opened and reset in a flood: cut
frames of unknown types are ignored (RFC 9113 section 5.5)
every call is answered: never with UNKNOWN, and never not at all
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from grpclib import server as grpc_server
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.protocol import Connection, H2Protocol, Stream
from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h2.events import RequestReceived, UnknownFrameReceived
from h2.settings import SettingCodes

from jobrunner.errors import InvalidRequest, LimitReached
from jobrunner.server.tcp import address_of

__all__ = ["CONFIGURATION", "Bounds", "CallHandler", "ServerProtocol", "ServerStream"]

logger = logging.getLogger(__name__)

CONFIGURATION = Configuration(
    _keepalive_time=20,
    _keepalive_timeout=10,
    _keepalive_permit_without_calls=True,
    _http2_max_pings_without_data=0,
    _http2_min_sent_ping_interval_without_data=10,
    http2_connection_window_size=512 * 1024,
    http2_stream_window_size=128 * 1024,
)
"""A dead peer is found within 30 s; what a peer can make the server hold before a handler reads it is small."""
MAX_UNREAD_ANSWERS = 256 * 1024
"""Bytes of answers to control frames (PING, SETTINGS) that a peer may leave unread."""
TIMEOUT = re.compile(r"[0-9]{1,8}[HMSmun]")
"""grpc-timeout: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md"""

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one connection; sizes in bytes, times in seconds."""

    max_message: int
    max_streams: int
    send_timeout: float


class ServerStream(Stream):
    """One call's HTTP/2 stream."""

    method = ""
    wants_message = False
    """Whether exactly one message is due from the client."""
    answered = False

    def __init__(self, connection: Connection, stream_id: int, bounds: Bounds) -> None:
        super().__init__(connection, connection._connection, connection._transport, stream_id=stream_id)
        self._bounds = bounds
        self._messages = 0
        self._in_message = False

    async def recv_data(self, size: int) -> bytes:
        """grpclib reads a message as its prefix of 5 bytes and then its body. Raises InvalidRequest and LimitReached."""
        if size > self._bounds.max_message:
            raise LimitReached(
                "read request", "max_message", f"its message of {size} bytes is longer than {self._bounds.max_message}"
            )
        try:
            data = await super().recv_data(size)
        except AssertionError as exc:  # grpclib's word for a stream that ends too early
            raise InvalidRequest("message", "the stream ends within it", verb="read request") from exc
        if not self._in_message and not data and self.wants_message and not self._messages:
            raise InvalidRequest("message", "there is none", verb="read request")
        if self._in_message and len(data) < size:
            raise InvalidRequest("message", "the stream ends within it", verb="read request")
        self._messages += self._in_message
        self._in_message = not self._in_message
        return data

    async def send_headers(self, headers: list[tuple[str, str]], end_stream: bool = False) -> None:
        with self._progress():
            await super().send_headers(_never_unknown(headers), end_stream)
        self.answered = self.answered or end_stream

    async def send_data(self, data: bytes, end_stream: bool = False) -> None:
        with self._progress():
            await super().send_data(data, end_stream)

    def end_call(self, status: Status, message: str) -> None:
        """Let the call be answered with this, wherever its handler is."""
        if self.wrapper is not None:
            self.wrapper.cancel(GRPCError(status, message))

    @contextmanager
    def _progress(self) -> Iterator[None]:
        """End the call if what is sent inside makes no progress for `send_timeout` seconds."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._bounds.send_timeout, self._check_progress, self.data_sent)
        try:
            yield
        finally:
            self._timer.cancel()

    def _check_progress(self, sent_before: int) -> None:
        loop, seconds = asyncio.get_running_loop(), self._bounds.send_timeout
        if self.data_sent > sent_before:
            self._timer = loop.call_later(seconds, self._check_progress, self.data_sent)  # `_progress` cancels it
        elif not self.connection.write_ready.is_set():
            # Nothing can be told to a peer that does not read: its other calls hang as well.
            peer = address_of(self.connection.get_peer().addr())
            logger.warning("cutting the connection of %s: it has read nothing for %g s (send_timeout)", peer, seconds)
            self._transport.abort()
        else:
            self.end_call(Status.RESOURCE_EXHAUSTED, f"cannot send: the client has read nothing for {seconds:g} s (send_timeout)")


def _never_unknown(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """grpclib answers UNKNOWN where the protocol has a word: for its own failures, and for requests that are none."""
    if ("grpc-status", str(Status.UNKNOWN.value)) not in headers:
        return headers
    bug = ("grpc-message", "Internal Server Error") in headers
    status = Status.INTERNAL if bug else Status.INVALID_ARGUMENT
    return [(name, str(status.value) if name == "grpc-status" else value) for name, value in headers]


class CallHandler(grpc_server.Handler):
    """The calls of one connection."""

    def accept(self, stream: Stream, headers: Any, release_stream: Callable[[], Any]) -> None:
        assert isinstance(stream, ServerStream)
        self.__gc_step__()
        stream.method = dict(headers).get(":path", "")
        method = self.mapping.get(stream.method)
        stream.wants_message = method is not None and not method.cardinality.client_streaming
        task = self.loop.create_task(self._answer(stream, _checked(headers), release_stream))
        # A call that is reset before its task has run once is cancelled without a line of it being executed.
        task.add_done_callback(lambda _: release_stream())
        self._tasks[stream] = task

    def unfinished(self) -> int:
        """Calls whose handler has not returned yet, counted up to ten too high (grpclib forgets them in tens)."""
        return len(self._tasks) + len(self._cancelled)

    async def _answer(self, stream: ServerStream, headers: Any, release_stream: Callable[[], Any]) -> None:
        await grpc_server.request_handler(
            self.mapping, stream, headers, self.codec, self.status_details_codec, self.dispatch, release_stream
        )
        if not stream.answered and stream.closable:  # headers that grpclib cannot read; it has logged why
            stream.reset_nowait(ErrorCodes.PROTOCOL_ERROR)


def _checked(headers: Headers) -> list[tuple[str, str]]:
    """A deadline that is none is told as such, and one that has passed is passed a millisecond from now: grpclib fails on both."""
    return [(name, _timeout(value) if name == "grpc-timeout" else value) for name, value in headers]


def _timeout(value: str) -> str:
    if not TIMEOUT.fullmatch(value):
        return "invalid"
    return "1m" if value[-1] in "nu" or not int(value[:-1]) else value


class ServerProtocol(H2Protocol):
    """One connection whose peer's certificate has been accepted."""

    transport: asyncio.Transport
    handler: CallHandler

    def __init__(
        self, handler: CallHandler, h2_config: H2Configuration, bounds: Bounds, live: set[ServerProtocol], changed: asyncio.Event
    ) -> None:
        """`live` is the server's set of connections, which this one enters and leaves by itself; `changed` is set when it has
        left, and when one of its calls is over.
        """
        super().__init__(handler, CONFIGURATION.__for_server__(), h2_config)
        self._bounds = bounds
        self._live = live
        self._changed = changed
        self._unread = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        super().connection_made(transport)
        self._live.add(self)
        self.connection._connection.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: self._bounds.max_streams})
        self.connection.flush()
        processors: dict[type, Any] = self.processor.processors
        processors[UnknownFrameReceived] = lambda event: None
        processors[RequestReceived] = self._request_received
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._cut("it does not speak HTTP/2 (ALPN h2)")

    def connection_lost(self, exc: BaseException | None) -> None:
        self._live.discard(self)
        super().connection_lost(exc)
        self._changed.set()

    def resume_writing(self) -> None:
        self._unread = 0
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        before = self.transport.get_write_buffer_size()
        super().data_received(data)
        if self.transport.is_closing():
            return
        # What is written while data comes in are answers to control frames. Output waits for the peer to read; these do not.
        if not self.connection.write_ready.is_set():
            self._unread += max(0, self.transport.get_write_buffer_size() - before)
        h2 = self.connection._connection
        if self._unread > MAX_UNREAD_ANSWERS:
            self._cut("it does not read the answers to its control frames")
        elif len(h2.incoming_buffer._data) > h2.max_inbound_frame_size + 9:
            self._cut("it sends frames longer than agreed")

    def streams(self) -> list[ServerStream]:
        """The calls that are being handled."""
        return [stream for stream in self.processor.streams.values() if isinstance(stream, ServerStream)]

    def go_away(self) -> None:
        """Tell the peer that this connection is over, and close it."""
        if not self.transport.is_closing():
            self.connection._connection.close_connection()
            self.connection.flush()
            self.processor.close("the server is shutting down")

    def _request_received(self, event: RequestReceived) -> None:
        # A call that is reset is handled to its end all the same: without this bound a flood of them would pile up.
        if self.handler.unfinished() > 4 * self._bounds.max_streams:
            self._cut("it resets calls faster than they can be ended")
            return
        assert event.stream_id is not None
        stream = ServerStream(self.connection, event.stream_id, self._bounds)
        release_stream = self.processor.register(stream)

        def release() -> None:
            if stream.id in self.processor.streams:
                release_stream()
            self._changed.set()

        self.handler.accept(stream, event.headers, release)

    def _cut(self, reason: str) -> None:
        if not self.transport.is_closing():
            logger.warning("cutting the connection of %s: %s", address_of(self.transport.get_extra_info("peername")), reason)
            self.transport.abort()
