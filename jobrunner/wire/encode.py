"""A part of a log as the bytes of its JobOutputResponse: made once and shared by every subscriber, and taken apart again.

The generated messages take 2 to 4 times as long as the bytes take to send, and would do so again for each subscriber. A message of
output is four fields, so they are written and read here; the tests compare with the generated code and with official protobuf.
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from jobrunner.job import Gap, Stream
from jobrunner.output import MAX_TIME, Begin, Chunk, End
from jobrunner.wire import messages as pb
from jobrunner.wire.codec import Encoded, StrictCodec
from jobrunner.wire.convert import output_from_wire, output_to_wire
from jobrunner.wire.write import varint, written

__all__ = ["Encoded", "decode_output", "encode_chunk", "encode_output"]

TAG = {Stream.STDOUT: b"\x0a", Stream.STDERR: b"\x12"}
STREAM = {0x0A: Stream.STDOUT, 0x12: Stream.STDERR}
CODEC = StrictCodec()
OFFSET = b"\x18"
TIME = b"\x22"
SECONDS = b"\x08"
NANOS = b"\x10"


def encode_output(part: Chunk | Gap | End | Begin) -> Encoded:
    """The message of any part of a log, or of where it begins."""
    return encode_chunk(part) if isinstance(part, Chunk) else Encoded(written(output_to_wire(part)))


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


def decode_output(message: Encoded) -> Chunk | Gap | End | Begin | None:
    """The part of a log that a message is; None for a kind that this version does not know. Raises MalformedMessage."""
    return _plain_chunk(message.raw) or output_from_wire(CODEC.decode(message.raw, pb.JobOutputResponse))


def _plain_chunk(raw: bytes) -> Chunk | None:
    """The chunk of a message as `_chunk_message` writes it: None for any other."""
    try:
        stream = STREAM[raw[0]]
        size, begin = _read_varint(raw, 1)
        at = end = begin + size
        offset = seconds = nanos = 0
        if raw[at] == OFFSET[0]:
            offset, at = _read_varint(raw, at + 1)
        if raw[at] != TIME[0] or raw[at + 1] != len(raw) - at - 2:
            return None
        at += 2
        if raw[at] == SECONDS[0]:
            seconds, at = _read_varint(raw, at + 1)
        if at < len(raw) and raw[at] == NANOS[0]:
            nanos, at = _read_varint(raw, at + 1)
    except (KeyError, IndexError):
        return None
    if at != len(raw) or not size or seconds >= MAX_TIME or nanos > 999_999_999:
        return None
    return Chunk(stream, raw[begin:end], offset, (seconds * 1_000_000 + nanos // 1000) / 1_000_000)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number that begins here, and where it ends. IndexError if it does not end, or is longer than ours ever are."""
    value = shift = 0
    while raw[at] > 0x7F:
        value |= (raw[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if shift > 56:
            raise IndexError
    return value | raw[at] << shift, at + 1


def _number(tag: bytes, value: int) -> bytes:
    return tag + varint(value) if value else b""
