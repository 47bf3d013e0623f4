"""HTTP/2 frames as they come: counted and cut into pieces before they are looked at, and which of them may be broken."""

from __future__ import annotations

from h2.errors import ErrorCodes
from h2.exceptions import FrameDataMissingError, FrameTooLargeError, ProtocolError
from h2.frame_buffer import FrameBuffer
from hyperframe.frame import Frame

__all__ = ["BrokenFrame", "FrameMeter", "Frames", "TooMuch"]

PREFACE = 24
"""Bytes of the client's connection preface (RFC 9113 section 3.4)."""
PIECE = 32
"""Frames that are handled in one go, before others are heard (`turns`)."""
CRUMB = 256
"""Bytes of DATA below which a frame counts as one that is sent for its own sake; so does one with padding."""
PRIORITY, SETTINGS, WINDOW_UPDATE, ACK, PADDED = 2, 4, 8, 1, 8


class TooMuch(ProtocolError):
    """The peer does something more often, or longer, than it may. The text goes to it."""

    error_code = ErrorCodes.ENHANCE_YOUR_CALM

    def __init__(self, reason: str, bound: str) -> None:
        super().__init__(f"{reason} ({bound})")
        self.bound = bound


class FrameMeter:
    """Counts the frames of a connection whose handling costs more than sending them: all but DATA that carries something."""

    def __init__(self, max_frame: int) -> None:
        """`max_frame` is the length in bytes of a payload that the peer has been told of."""
        self._max_frame = max_frame
        self._head = b""
        self._payload = PREFACE

    def pieces(self, data: bytes) -> tuple[int, list[bytes]]:
        """How many such frames begin in what the peer sends, and that in pieces of PIECE frames of any kind, at most.

        Raises ProtocolError for a frame that is too long, before it is there.
        """
        held = len(self._head)
        all_of_it = self._head + data if held else data
        at, costly, begun, cuts = self._payload, 0, 0, [0]
        while at + 9 <= len(all_of_it):
            length = int.from_bytes(all_of_it[at : at + 3], "big")
            if length > self._max_frame:
                raise FrameTooLargeError(f"a frame of {length} bytes is longer than {self._max_frame} (SETTINGS_MAX_FRAME_SIZE)")
            if all_of_it[at + 3] == SETTINGS and all_of_it[at + 4] & ACK and length:
                raise FrameTooLargeError("an acknowledgement of SETTINGS has a payload")  # h2 would say PROTOCOL_ERROR
            if begun and not begun % PIECE:
                cuts.append(at - held)
            costly += all_of_it[at + 3] != 0 or length < CRUMB or bool(all_of_it[at + 4] & PADDED)
            begun += 1
            at += 9 + length
        self._head, self._payload = (all_of_it[at:], 0) if at < len(all_of_it) else (b"", at - len(all_of_it))
        return costly, [data[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(data)], strict=True)]


class BrokenFrame(Frame):
    """Stands for a frame that cannot be read, where that is an error of its stream alone."""

    def __init__(self, stream_id: int, code: ErrorCodes) -> None:
        super().__init__(stream_id)
        self.code = code


class Frames(FrameBuffer):
    """h2's frames, of which two kinds may be broken without ending the connection (RFC 9113 sections 6.3 and 6.9)."""

    def __next__(self) -> Frame:
        try:
            return super().__next__()
        except ProtocolError as exc:
            head = bytes(self._data[:9])
            length, kind, stream_id = int.from_bytes(head[:3], "big"), head[3], int.from_bytes(head[5:], "big") & 0x7FFFFFFF
            if kind == PRIORITY and isinstance(exc, FrameDataMissingError):
                code = ErrorCodes.FRAME_SIZE_ERROR
            elif kind == WINDOW_UPDATE and length == 4:
                code = ErrorCodes.PROTOCOL_ERROR  # an increment of 0
            else:
                raise
            if not stream_id or self._headers_buffer:
                raise
            del self._data[: 9 + length]
            return BrokenFrame(stream_id, code)
