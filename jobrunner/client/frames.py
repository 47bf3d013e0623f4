"""What a server sends, from TLS to h2, without the copies that h2 makes of it on the way.

TLS decrypts into the buffer here. A DATA frame is cut out of it once and given to h2 as the object that h2 itself would have made
of it, four copies and a dump in hexadecimal later; output is nothing but such frames. All others go through h2 as they came, one
at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from h2.errors import ErrorCodes
from h2.exceptions import FrameTooLargeError, ProtocolError
from hyperframe.frame import DataFrame

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h2.connection import H2Connection
    from h2.events import Event

__all__ = ["FrameBuffer"]

HEAD = 9
"""Bytes before the payload of a frame (RFC 9113 section 4.1)."""


class FrameBuffer:
    """Bytes received of one connection: those of one frame at least, if it is no longer than `max_frame`."""

    def __init__(self, max_frame: int) -> None:
        self._bytes = bytearray(HEAD + max_frame + 16384)
        self._view = memoryview(self._bytes)
        self._max_frame = max_frame
        self._start = self._end = 0

    def __repr__(self) -> str:
        return f"<FrameBuffer {self._end - self._start} bytes>"

    def room(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._start:
            rest = self._end - self._start
            self._bytes[:rest] = self._bytes[self._start : self._end]
            self._start, self._end = 0, rest
        return self._view[self._end :]

    def add(self, count: int) -> None:
        """So many bytes have been put there."""
        self._end += count

    def receive(self, h2: H2Connection) -> Iterator[list[Event]]:
        """What h2 says to each frame that has come whole. Ask for the next only if that did not end the connection.

        Raises ProtocolError; h2 has its GOAWAY ready then.
        """
        while self._end - self._start >= HEAD:
            head = self._bytes[self._start : self._start + HEAD]
            length, stream_id = int.from_bytes(head[:3], "big"), int.from_bytes(head[5:], "big") & 0x7FFFFFFF
            begin, stop = self._start + HEAD, self._start + HEAD + length
            if length > self._max_frame:
                h2._terminate_connection(ErrorCodes.FRAME_SIZE_ERROR)
                raise FrameTooLargeError(f"a frame of {length} bytes is longer than {self._max_frame}")
            if stop > self._end:
                return
            self._start = stop
            # No flags: neither the end of its stream nor padding. Within a block of headers no DATA may come: h2 refuses it.
            if head[3] == DataFrame.type and not head[4] and stream_id and not h2.incoming_buffer._headers_buffer:
                yield _receive(h2, DataFrame(stream_id, bytes(self._view[begin:stop])))
            else:
                yield h2.receive_data(self._view[begin - HEAD : stop])


def _receive(h2: H2Connection, frame: DataFrame) -> list[Event]:
    """As `h2.receive_data` treats a frame that it has parsed."""
    try:
        if frame.stream_id not in h2.streams:  # one that was given up, or never was
            return h2._receive_frame(frame)
        # Not so for the others: it writes each frame out in hexadecimal, for a log that nobody asked for.
        answers, events = h2._receive_data_frame(frame)
        h2._prepare_for_sending(answers)
    except ProtocolError as exc:
        h2._terminate_connection(exc.error_code)
        raise
    return events
