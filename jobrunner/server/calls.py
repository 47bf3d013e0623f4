"""The calls of one connection: each is a task that ends with an answer, whatever its request was."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from grpclib import server as grpc_server
from grpclib.protocol import Stream
from h2.errors import ErrorCodes

from jobrunner.server.stream import ServerStream

__all__ = ["CallHandler"]

TIMEOUT = re.compile(r"[0-9]{1,8}[HMSmun]")
"""grpc-timeout: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md"""

Headers = Sequence[tuple[str, str]]


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

    def cancel(self, stream: Stream) -> None:
        """The peer has reset it. grpclib fails if its task has just ended."""
        if stream in self._tasks:
            super().cancel(stream)

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
            stream.no_call("its headers cannot be read")
            stream.reset_nowait(ErrorCodes.PROTOCOL_ERROR)


def _checked(headers: Headers) -> list[tuple[str, str]]:
    """A deadline that is none is told as such, and one that has passed is passed a millisecond from now: grpclib fails on both."""
    return [(name, _timeout(value) if name == "grpc-timeout" else value) for name, value in headers]


def _timeout(value: str) -> str:
    if not TIMEOUT.fullmatch(value):
        return "invalid"
    return "1m" if value[-1] in "nu" or not int(value[:-1]) else value
