"""One call as it is sent and received: grpclib's stream with the bounds that it lacks.

message size            a longer one is RESOURCE_EXHAUSTED before it is buffered; so is one more than a user may hold
a message that does not come, a send without progress: end their call, or the connection if that is what stalls
every call is answered: never with UNKNOWN
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import encode_bin_value, encode_grpc_message
from grpclib.protocol import Connection, Stream

from jobrunner.errors import InvalidRequest, JobRunnerError, LimitReached
from jobrunner.wire.status import error_to_wire

if TYPE_CHECKING:
    from jobrunner.bounds import Bounds
    from jobrunner.server.connection import Http2
    from jobrunner.server.shared import ServerConnection

__all__ = ["ServerStream"]

MAX_AT_ONCE = 128 * 1024
"""Bytes of a message that may be written at once: a log's chunks. Longer ones wait for the peer between their frames."""
AT_ONCE = 64 * 1024
"""Bytes in one write: TLS keeps a buffer for each connection that is as long as the longest was."""
PUSHBACK = "grpc-retry-pushback-ms"
"""Other gRPC clients know it: https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback"""


class ServerStream(Stream):
    """One call's HTTP/2 stream."""

    method = ""
    wants_message = False
    """Whether exactly one message is due from the client."""
    answered = False
    refusal: LimitReached | None = None
    """Why this call is not looked at, if it is not."""
    pushback: float = 0.0
    """Seconds after which the client may make this call again, told with its end; 0 for nothing to tell."""

    def __init__(self, connection: Connection, stream_id: int, bounds: Bounds) -> None:
        super().__init__(connection, connection._connection, connection._transport, stream_id=stream_id)
        self._bounds = bounds
        self._messages = 0
        self._held = 0
        """Bytes of its message, as long as the call lasts or the next one comes."""
        self._in_message = False

    async def recv_data(self, size: int) -> bytes:
        """grpclib reads a message as its prefix of 5 bytes and then its body. Raises InvalidRequest and LimitReached."""
        if size > self._bounds.max_message:
            raise LimitReached(
                "read request", "max_message", f"its message of {size} bytes is longer than {self._bounds.max_message}"
            )
        if self._in_message:
            self._hold(size)
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

    def _hold(self, size: int) -> None:
        protocol = self._own_connection.protocol
        protocol.shared.hold(protocol.user, self._held, size)
        self._held = size

    def let_go(self) -> None:
        """The call is over."""
        self._hold(0)

    async def _received(self, size: int) -> bytes:
        """What has begun has to be there in time; a call that streams to the server may be silent between its messages."""
        if self.wants_message or self._in_message:
            return await self._in_time(size)
        first = await super().recv_data(1)
        return first + await self._in_time(size - 1) if first else first

    async def _in_time(self, size: int) -> bytes:
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

    def no_call(self, reason: str) -> None:
        """Tell that this request is none."""
        self._own_connection.protocol.no_call(self.method, reason)

    async def send_headers(self, headers: list[tuple[str, str]], end_stream: bool = False) -> None:
        headers = _never_unknown(headers)
        if self.wrapper is None and self.refusal is None:  # grpclib has taken it for no call, and says so by itself
            self.no_call(_told(headers))
        if end_stream and self.pushback:
            headers.append((PUSHBACK, str(math.ceil(1000 * self.pushback))))
        with self._progress():
            await super().send_headers(headers, end_stream)
        self.answered = self.answered or end_stream

    async def send_data(self, data: bytes, end_stream: bool = False) -> None:
        if end_stream or len(data) > self.room():
            with self._progress():
                await self._send_as_it_goes(data, end_stream)
        else:
            self._send_at_once(data)

    async def ready(self) -> None:
        """Until something of a message would go out at once; in line with the other calls of the connection.

        Whoever waits here holds no message yet, where one that is sent waits with a copy of its own.
        """
        if self.closable and not (self.room() and self._own_connection.line.empty):
            with self._progress():
                await self._turn()

    async def _turn(self) -> None:
        """Until the peer takes something and it is this call's turn. Order: the caller sends before anyone else runs.

        A call that has no credit of its own is not in the line: it would hold up those that have.
        """
        assert self.id is not None
        connection = self._own_connection
        while True:
            while self._credit() <= 0:
                self.window_updated.clear()
                await self.window_updated.wait()
            async with connection.line.place():
                while self._credit() > 0:
                    if not connection.write_ready.is_set():
                        await connection.write_ready.wait()
                    elif self._h2_connection.local_flow_control_window(self.id) <= 0:  # what all calls share
                        self.window_updated.clear()
                        await self.window_updated.wait()
                    else:
                        return

    async def _send_as_it_goes(self, data: bytes, end_stream: bool) -> None:
        """Frame by frame. As grpclib's, but in line: there all calls that wait would write when there is room for the first."""
        assert self.id is not None
        h2, connection, size, at = self._h2_connection, self._own_connection, len(data), 0
        while at < size:
            if not self.room():
                await self._turn()
            part = min(h2.local_flow_control_window(self.id), h2.max_outbound_frame_size, size - at)
            h2.send_data(self.id, data[at : at + part], end_stream=end_stream and at + part == size)
            self._transport.write(h2.data_to_send())
            at += part
            self.data_sent += part
            connection.data_sent += part
            connection.data_send_process()

    def _credit(self) -> int:
        """Bytes that the peer takes of this call, whatever it takes of all of them. Negative if it has made its windows smaller."""
        assert self.id is not None
        return cast("Http2", self._h2_connection).credit(self.id)

    @property
    def _own_connection(self) -> ServerConnection:
        return cast("ServerConnection", self.connection)

    def room(self) -> int:
        """Bytes of a message that would go out at once: nothing is in their way."""
        if not self.connection.write_ready.is_set() or self._own_connection.line.held or not self.closable:
            return 0
        assert self.id is not None
        return max(0, min(self._h2_connection.local_flow_control_window(self.id), MAX_AT_ONCE))

    def _send_at_once(self, data: bytes) -> None:
        """All of its frames, in few writes, and no timer for what waits for nobody."""
        assert self.id is not None
        h2, size = cast("Http2", self._h2_connection), len(data)
        for begin in range(0, size, AT_ONCE):
            parts: list[bytes | memoryview] = [h2.data_to_send()]
            end = min(begin + AT_ONCE, size)
            for at in range(begin, end, h2.max_outbound_frame_size):
                part = memoryview(data)[at : min(at + h2.max_outbound_frame_size, end)]
                parts += (h2.data_head(self.id, len(part)), part)
            self._transport.write(b"".join(parts))
        self.data_sent += size
        self.connection.data_sent += size
        self.connection.data_send_process()

    def end_call(self, status: Status, message: str) -> None:
        """Let the call be answered with this, wherever its handler is."""
        if self.wrapper is not None:
            self.wrapper.cancel(GRPCError(status, message))

    @contextmanager
    def _progress(self) -> Iterator[None]:
        """End the call if what is sent inside makes no progress for `send_timeout` seconds."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._bounds.send_timeout, self._check_progress, self._sent())
        try:
            yield
        finally:
            self._timer.cancel()

    def _sent(self) -> tuple[int, int]:
        """Bytes by this call, and by all of its connection: who waits in line for these makes progress with them."""
        in_line = self.closable and self._credit() > 0
        return self.data_sent, self.connection.data_sent if in_line else 0

    def _check_progress(self, before: tuple[int, int], spared: bool = False) -> None:
        loop, seconds = asyncio.get_running_loop(), self._bounds.send_timeout
        protocol, now = self._own_connection.protocol, self._sent()
        moved = now[0] > before[0] or now[1] > before[1]
        if moved or (self.connection.write_ready.is_set() and not spared and self._holds_nothing()):
            self._timer = loop.call_later(seconds, self._check_progress, now, not moved)  # `_progress` cancels it
        elif not self.connection.write_ready.is_set():
            # Nothing can be told to a peer that does not read: its other calls hang as well.
            protocol.cut(f"it has read nothing for {seconds:g} s (send_timeout)", "send_timeout")
        else:
            protocol.shared.account.met("send_timeout")
            self.end_call(Status.RESOURCE_EXHAUSTED, f"cannot send: the client has read nothing for {seconds:g} s (send_timeout)")

    def _holds_nothing(self) -> bool:
        """Whether the peer has read all that this call has sent: then others hold the window that it waits for, and end first."""
        return self.closable and self._credit() >= self._h2_connection.remote_settings.initial_window_size


def _told(headers: list[tuple[str, str]]) -> str:
    """What an answer without a call says: `HTTP 405`, `HTTP 415: Missing content-type header`, `Method not found`."""
    found = dict(headers)
    http = "" if found[":status"] == "200" else f"HTTP {found[':status']}"
    return ": ".join(filter(None, (http, found.get("grpc-message"))))


def _never_unknown(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """grpclib answers UNKNOWN where the protocol has a word: for its own failures, and for requests that are none."""
    if ("grpc-status", str(Status.UNKNOWN.value)) not in headers:
        return headers
    bug = ("grpc-message", "Internal Server Error") in headers
    status = Status.INTERNAL if bug else Status.INVALID_ARGUMENT
    return [(name, str(status.value) if name == "grpc-status" else value) for name, value in headers]
