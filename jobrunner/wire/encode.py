"""A part of a log as the bytes of its JobOutputResponse, made once and shared by every subscriber.

The generated messages take 2 to 4 times as long to encode as the bytes take to send, and would do so again for each subscriber. A
message of output is four fields, so they are written here; the tests compare the bytes with the generated code's and with official
protobuf's. https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from jobrunner.job import Gap, Stream
from jobrunner.output import Begin, Chunk, End
from jobrunner.wire.convert import output_to_wire

__all__ = ["Encoded", "encode_chunk", "encode_output"]

TAG = {Stream.STDOUT: b"\x0a", Stream.STDERR: b"\x12"}
OFFSET = b"\x18"
TIME = b"\x22"
SECONDS = b"\x08"
NANOS = b"\x10"


class Encoded:
    """Bytes that are a message already; what the codec needs to send them, and no more."""

    __slots__ = ("raw",)

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def __repr__(self) -> str:
        return f"<Encoded {len(self.raw)} bytes>"

    def SerializeToString(self) -> bytes:  # noqa: N802 - the name that codecs call
        return self.raw


def encode_output(part: Chunk | Gap | End | Begin) -> Encoded:
    """The message of any part of a log, or of where it begins."""
    return encode_chunk(part) if isinstance(part, Chunk) else Encoded(bytes(output_to_wire(part)))


def encode_chunk(chunk: Chunk) -> Encoded:
    """The message of a chunk: its bytes under the stream's field, its offset and its time (to the microsecond). Kept in it."""
    if chunk.message is None:
        object.__setattr__(chunk, "message", _chunk_message(chunk))
        assert chunk.message is not None
    return Encoded(chunk.message)


def _chunk_message(chunk: Chunk) -> bytes:
    seconds, micros = divmod(round(chunk.time * 1_000_000), 1_000_000)
    moment = _number(SECONDS, seconds) + _number(NANOS, micros * 1000)
    length = TAG[chunk.stream] + varint(len(chunk.data)) if chunk.data else b""
    return b"".join((length, chunk.data, _number(OFFSET, chunk.offset), TIME + varint(len(moment)), moment))


def varint(value: int) -> bytes:
    """A number of at least 0 and less than 2^64 in base 128, lowest digit first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(tag: bytes, value: int) -> bytes:
    return tag + varint(value) if value else b""
