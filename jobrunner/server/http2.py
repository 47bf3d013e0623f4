"""What one authenticated peer may do on its connection: grpclib's HTTP/2 protocol with the bounds that it lacks.

message size            a longer one is RESOURCE_EXHAUSTED before it is buffered
headers too long        RESOURCE_EXHAUSTED; four times as long: the end of the connection
calls too many at once  REFUSED_STREAM, which clients know as not begun
a message that does not come, a send without progress: end their call, or the connection if that is what stalls
frames in a flood, answers that are not read, frames too long, calls reset in a flood: the end of the connection
errors of the protocol  GOAWAY with the code of RFC 9113; every end of a connection tells its reason in GOAWAY's debug data
frames of unknown types are ignored (RFC 9113 section 5.5)
every call is answered: never with UNKNOWN, and never not at all
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

from grpclib import server as grpc_server
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import encode_bin_value, encode_grpc_message
from grpclib.protocol import Connection, EventsProcessor, H2Protocol, Peer, Stream
from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h2.events import RequestReceived, TrailersReceived, UnknownFrameReceived
from h2.exceptions import ProtocolError

from jobrunner.errors import InvalidRequest, JobRunnerError, LimitReached
from jobrunner.server.frames import FrameMeter, Http2, TooMuch, checked_headers
from jobrunner.server.limits import Bucket, Rate
from jobrunner.server.tcp import address_of
from jobrunner.wire.status import error_to_wire

__all__ = ["CONFIGURATION", "Bounds", "CallHandler", "ServerPeer", "ServerProtocol", "ServerStream"]

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
MAX_AT_ONCE = 128 * 1024
"""Bytes of a message that may be written at once: a log's chunks. Longer ones wait for the peer between their frames."""
TIMEOUT = re.compile(r"[0-9]{1,8}[HMSmun]")
"""grpc-timeout: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md"""

PUSHBACK = "grpc-retry-pushback-ms"
"""Other gRPC clients know it: https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback"""

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one connection; sizes in bytes, times in seconds."""

    max_message: int
    max_header_size: int
    max_streams: int
    max_connections_per_user: int
    receive_timeout: float
    send_timeout: float


class ServerStream(Stream):
    """One call's HTTP/2 stream."""

    method = ""
    wants_message = False
    """Whether exactly one message is due from the client."""
    answered = False
    refusal: JobRunnerError | None = None
    """Why this call is not looked at, if it is not."""
    pushback: float = 0.0
    """Seconds after which the client may make this call again, told with its end; 0 for nothing to tell."""

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
            data = await self._received(size)
        except AssertionError as exc:  # grpclib's word for a stream that ends too early
            raise InvalidRequest("message", "the stream ends within it", verb="read request") from exc
        if not self._in_message and not data and self.wants_message and not self._messages:
            raise InvalidRequest("message", "there is none", verb="read request")
        if self._in_message and len(data) < size:
            raise InvalidRequest("message", "the stream ends within it", verb="read request")
        self._messages += self._in_message
        self._in_message = not self._in_message
        return data

    async def _received(self, size: int) -> bytes:
        """Not for a call that streams to the server, which may be silent as long as it likes."""
        if not self.wants_message:
            return await super().recv_data(size)
        seconds = self._bounds.receive_timeout
        try:
            async with asyncio.timeout(seconds):
                return await super().recv_data(size)
        except TimeoutError as exc:
            why = f"its message is not there after {seconds:g} s"
            raise LimitReached("read request", "receive_timeout", why) from exc

    async def refuse(self, error: JobRunnerError) -> None:
        """Answer with this error, where there is no handler to do it."""
        wire = error_to_wire(error)
        headers = [(":status", "200"), ("content-type", "application/grpc+proto"), ("grpc-status", str(wire.status.value))]
        headers.append(("grpc-message", encode_grpc_message(wire.message)))
        headers += [(name, encode_bin_value(value).decode()) for name, value in wire.trailer.items()]
        await self.send_headers(headers, end_stream=True)
        if self.closable:
            self.reset_nowait()

    async def send_headers(self, headers: list[tuple[str, str]], end_stream: bool = False) -> None:
        headers = _never_unknown(headers)
        if end_stream and self.pushback:
            headers.append((PUSHBACK, str(math.ceil(1000 * self.pushback))))
        with self._progress():
            await super().send_headers(headers, end_stream)
        self.answered = self.answered or end_stream

    async def send_data(self, data: bytes, end_stream: bool = False) -> None:
        if not self._send_at_once(data, end_stream):
            with self._progress():
                await super().send_data(data, end_stream)

    def _send_at_once(self, data: bytes, end_stream: bool) -> bool:
        """If nothing is in its way: all of its frames in one write, and no timer for what waits for nobody. Else False."""
        assert self.id is not None
        h2, size = self._h2_connection, len(data)
        if size > MAX_AT_ONCE or not self.connection.write_ready.is_set() or h2.local_flow_control_window(self.id) < size:
            return False
        most = h2.max_outbound_frame_size
        for at in range(0, size or 1, most):
            h2.send_data(self.id, data[at : at + most], end_stream=end_stream and at + most >= size)
        self._transport.write(h2.data_to_send())
        self.data_sent += size
        self.connection.data_sent += size
        self.connection.data_send_process()
        return True

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
        if stream.refusal is not None:
            await stream.refuse(stream.refusal)
            return
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


class ServerPeer(Peer):
    """Who is at the other end of a connection, and the connection itself: what a call's hooks are given."""

    def __init__(self, protocol: ServerProtocol) -> None:
        super().__init__(protocol.transport)
        self.protocol = protocol


class ServerConnection(Connection):
    """grpclib's connection, which knows its protocol."""

    protocol: ServerProtocol

    def get_peer(self) -> ServerPeer:
        return ServerPeer(self.protocol)


class ServerProtocol(H2Protocol):
    """One connection whose peer's certificate has been accepted."""

    transport: asyncio.Transport
    handler: CallHandler
    user = ""
    """The CN of the client's certificate, "" if there is not exactly one."""
    frames: Bucket

    def __init__(
        self,
        handler: CallHandler,
        h2_config: H2Configuration,
        bounds: Bounds,
        frames: Rate,
        live: set[ServerProtocol],
        changed: asyncio.Event,
    ) -> None:
        """`live` is the server's set of connections, which this one enters and leaves by itself; `changed` is set when it has
        left, and when one of its calls is over. `frames` are those that a user may send.
        """
        super().__init__(handler, CONFIGURATION.__for_server__(), h2_config)
        self._bounds = bounds
        self._rate = frames
        self._live = live
        self._changed = changed
        self._unread = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As grpclib's, with an HTTP/2 connection of our own."""
        self.transport = cast("asyncio.Transport", transport)
        window = self.config.http2_stream_window_size
        limits = {"max_streams": self._bounds.max_streams, "max_header_size": self._bounds.max_header_size}
        self.http2 = Http2(self.h2_config, stream_window=window, **limits)
        self.http2.initiate_connection()
        self.http2.increment_flow_control_window(self.config.http2_connection_window_size - 65535)
        self._meter = FrameMeter(self.http2.max_inbound_frame_size)
        self.connection = ServerConnection(self.http2, self.transport, config=self.config)
        self.connection.protocol = self
        self.connection.flush()
        self.connection.initialize()
        self.processor = EventsProcessor(self.handler, self.connection)
        processors: dict[type, Any] = self.processor.processors
        processors[UnknownFrameReceived] = lambda event: None
        processors[RequestReceived] = self._request_received
        processors[TrailersReceived] = self._trailers_received
        self.user = _user_of(transport)
        self.frames = self._rate.of(self.user)
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._cut("it does not speak HTTP/2 (ALPN h2)")
            return
        most = self._bounds.max_connections_per_user
        if sum(other.user == self.user for other in self._live) >= most:
            self.end(f'cannot connect: user "{self.user}" has {most} connections (max_connections_per_user)')
        self._live.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._live.discard(self)
        super().connection_lost(exc)
        self._changed.set()

    def resume_writing(self) -> None:
        self._unread = 0
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # what was under way when the connection was ended
        before = self.transport.get_write_buffer_size()
        try:
            if self.frames.take(self._meter.count(data)):
                raise TooMuch(f"more than {self.frames.per_second:g} small frames a second ({self._rate.bound})")
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
        if self._unread > MAX_UNREAD_ANSWERS:
            self._cut("it does not read the answers to its control frames")

    def streams(self) -> list[ServerStream]:
        """The calls that are being handled."""
        return [stream for stream in self.processor.streams.values() if isinstance(stream, ServerStream)]

    def go_away(self) -> None:
        """Tell the peer that this connection is over, and close it."""
        if not self.transport.is_closing():
            self.http2.close_connection()
            self.connection.flush()
            self.processor.close("the server is shutting down")

    def end(self, reason: str, code: ErrorCodes = ErrorCodes.ENHANCE_YOUR_CALM) -> None:
        """End the connection at once and tell the peer why: `cannot VERB: reason (bound)`, in GOAWAY's debug data."""
        if self.transport.is_closing():
            return
        logger.warning("ending the connection of %s, %r: %s", self._address(), self.user, reason)
        with suppress(ProtocolError):  # it has been told GOAWAY already
            self.http2.close_connection(code, additional_data=reason.encode()[:1024])
        self.connection.flush()
        self.processor.close(reason)

    def _protocol_error(self, exc: ProtocolError) -> None:
        self.end(f"cannot go on: {str(exc) or type(exc).__name__}", exc.error_code)

    def _request_received(self, event: RequestReceived) -> None:
        # A call that is reset is handled to its end all the same: without this bound a flood of them would pile up.
        if self.handler.unfinished() > 4 * self._bounds.max_streams:
            self._cut("it resets calls faster than they can be ended")
            return
        assert event.stream_id is not None
        try:
            headers = checked_headers(event.headers or ())
        except ProtocolError as exc:
            self._malformed(event.stream_id, exc)
            return
        known = self.http2.streams
        if sum(number in known and not known[number].closed for number in self.processor.streams) >= self._bounds.max_streams:
            self.http2.reset_stream(event.stream_id, ErrorCodes.REFUSED_STREAM)
            return
        stream = ServerStream(self.connection, event.stream_id, self._bounds)
        size = sum(len(name) + len(value) + 32 for name, value in headers)
        if size > self._bounds.max_header_size:
            reason = f"its headers of {size} bytes are longer than {self._bounds.max_header_size}"
            stream.refusal = LimitReached("read request", "max_header_size", reason)
        release_stream = self.processor.register(stream)

        def release() -> None:
            if stream.id in self.processor.streams:
                release_stream()
            self._changed.set()

        self.handler.accept(stream, headers, release)

    def _trailers_received(self, event: TrailersReceived) -> None:
        """Of a request they say nothing that matters here, but may be malformed."""
        assert event.stream_id is not None
        try:
            checked_headers(event.headers or (), trailers=True)
        except ProtocolError as exc:
            self._malformed(event.stream_id, exc)

    def _malformed(self, stream_id: int, exc: ProtocolError) -> None:
        logger.info("a call of %s, %r, is malformed: %s", self._address(), self.user, exc)
        if stream_id in self.http2.streams:
            self.http2.reset_stream(stream_id, ErrorCodes.PROTOCOL_ERROR)
        stream = self.processor.streams.get(stream_id)
        if stream is not None:
            stream.__terminated__("malformed trailers")

    def _cut(self, reason: str) -> None:
        """Without a word to who would not read it."""
        if not self.transport.is_closing():
            logger.warning("cutting the connection of %s: %s", self._address(), reason)
            self.transport.abort()

    def _address(self) -> str:
        return address_of(self.transport.get_extra_info("peername"))


def _user_of(transport: asyncio.BaseTransport) -> str:
    """The CN of the certificate, "" if there is not exactly one: those are one user, who may do nothing."""
    subject = (transport.get_extra_info("peercert") or {}).get("subject", ())
    names = [value for rdn in subject for key, value in rdn if key == "commonName"]
    return str(names[0]) if len(names) == 1 else ""
