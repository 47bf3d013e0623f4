"""The codec of both sides: protobuf as it is written, nothing else.

betterproto2 parses what it should refuse: wrong wire types, messages that end too early, plain garbage. So every message is walked
first, against the fields of its type: https://protobuf.dev/programming-guides/encoding/. Fields that are not known are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import betterproto2
from grpclib.encoding.base import CodecBase

from jobrunner.wire.write import written

__all__ = ["Encoded", "MalformedMessage", "StrictCodec", "TooManyFields", "check_message", "payloads"]

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
MAX_DEPTH = 32
"""Messages within messages; ours are four deep."""
MAX_UNKNOWN = 1000
"""Fields in one message that are unknown, or a plain one's repeats: betterproto2 takes time that grows with their square."""

WIRE_TYPE = {
    **dict.fromkeys(betterproto2.WIRE_VARINT_TYPES, VARINT),
    **dict.fromkeys(betterproto2.WIRE_FIXED_64_TYPES, FIXED64),
    **dict.fromkeys(betterproto2.WIRE_FIXED_32_TYPES, FIXED32),
    **dict.fromkeys(betterproto2.WIRE_LEN_DELIM_TYPES, LENGTH),
}


class MalformedMessage(ValueError):
    """These bytes are no message of this type; the text says where and why."""


class TooManyFields(MalformedMessage):
    """There may be more of them in a message than its reader wants to look at."""


class Encoded:
    """Bytes that are a message: sent as they are, and received so by whoever takes them apart by himself."""

    __slots__ = ("raw",)

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def __repr__(self) -> str:
        return f"<Encoded {len(self.raw)} bytes>"


class StrictCodec(CodecBase):
    """Protobuf for grpclib; `decode` raises MalformedMessage."""

    __content_subtype__ = "proto"

    def __init__(self, max_fields: int = 65536) -> None:
        """So many fields may be in one message that is read, not counting those of messages within it."""
        self._max_fields = max_fields

    def encode(self, message: Any, message_type: type[Any]) -> bytes:
        if not isinstance(message, message_type):
            raise TypeError(f"cannot encode message: {type(message).__name__} is not {message_type.__name__}")
        return message.raw if isinstance(message, Encoded) else written(message)

    def decode(self, data: bytes, message_type: type[Any]) -> Any:
        if message_type is Encoded:
            return Encoded(data)
        check_message(data, message_type, self._max_fields)
        try:
            return message_type.FromString(data)
        except (ValueError, OverflowError) as exc:  # UnicodeDecodeError is a ValueError; a Timestamp out of range overflows
            raise MalformedMessage(f"cannot parse {message_type.__name__}: {exc}") from exc


def check_message(data: bytes, message_type: type[Any], max_fields: int, depth: int = 0) -> None:
    """Raises MalformedMessage unless `data` is a message of this generated type, as far as the types of its fields go."""
    if depth > MAX_DEPTH:
        raise MalformedMessage(f"cannot parse {message_type.__name__}: more than {MAX_DEPTH} messages within each other")
    meta: betterproto2.ProtoClassMetadata = message_type._betterproto
    try:
        at = fields = unknown = 0
        seen: set[str] = set()
        while at < len(data):
            number, wire_type, start, at = _next_field(data, at)
            name = meta.field_name_by_number.get(number)
            fields += 1
            # A plain field may come again, and the last counts; whoever makes use of that sends few of them.
            unknown += name is None or (name in seen and not _may_repeat(meta.meta_by_field_name[name]))
            if fields > max_fields:
                raise TooManyFields(f"it has more than {max_fields} fields")
            if unknown > MAX_UNKNOWN:
                raise MalformedMessage(f"it has more than {MAX_UNKNOWN} fields that are unknown or repeated")
            if name is None:
                continue
            seen.add(name)
            field = meta.meta_by_field_name[name]
            if wire_type != WIRE_TYPE[field.proto_type] and not _is_packed(field, wire_type, data, start, at):
                raise MalformedMessage(f"field {name} has wire type {wire_type}")
            nested = _nested(meta, name, field)
            if nested is not None:
                check_message(data[start:at], nested, max_fields, depth + 1)
    except MalformedMessage as exc:
        text = str(exc)
        raise type(exc)(text if text.startswith("cannot") else f"cannot parse {message_type.__name__}: {text}") from None


def _may_repeat(field: betterproto2.FieldMetadata) -> bool:
    return bool(field.repeated) or field.proto_type == betterproto2.TYPE_MAP


def payloads(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each field that has a length: strings, bytes and messages. Raises MalformedMessage."""
    at = 0
    while at < len(data):
        number, wire_type, start, at = _next_field(data, at)
        if wire_type == LENGTH:
            yield number, data[start:at]


def _nested(meta: betterproto2.ProtoClassMetadata, name: str, field: betterproto2.FieldMetadata) -> type[Any] | None:
    """The message type of a field, a map's entry included; None for a scalar."""
    if field.unwrap is not None:
        return field.unwrap()
    return meta.cls_by_field[name] if field.proto_type in (betterproto2.TYPE_MESSAGE, betterproto2.TYPE_MAP) else None


def _is_packed(field: betterproto2.FieldMetadata, wire_type: int, data: bytes, at: int, end: int) -> bool:
    """Whether a repeated number has come as one run of bytes, the other way in which it may."""
    if not field.repeated or wire_type != LENGTH or field.proto_type not in betterproto2.PACKED_TYPES:
        return False
    while at < end:
        at = _skip(data, at, WIRE_TYPE[field.proto_type])
    return at == end


def _next_field(data: bytes, at: int) -> tuple[int, int, int, int]:
    """Number, wire type, where the payload starts and where the field ends."""
    tag, at = _varint(data, at)
    number, wire_type = tag >> 3, tag & 7
    if not 0 < number < 1 << 29:
        raise MalformedMessage(f"{number} is no field number")
    if wire_type == LENGTH:
        length, at = _varint(data, at)
        if length > len(data) - at:
            raise MalformedMessage(f"field {number} has {length} bytes, {len(data) - at} are there")
        return number, wire_type, at, at + length
    return number, wire_type, at, _skip(data, at, wire_type)


def _skip(data: bytes, at: int, wire_type: int) -> int:
    """Where a varint or fixed-size number that starts here ends."""
    if wire_type == VARINT:
        return _varint(data, at)[1]
    if wire_type not in (FIXED64, FIXED32):
        raise MalformedMessage(f"{wire_type} is no wire type of proto3")
    end = at + (8 if wire_type == FIXED64 else 4)
    if end > len(data):
        raise MalformedMessage("it ends within a number")
    return end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise MalformedMessage("it ends within a varint")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise MalformedMessage("a varint has more than 10 bytes")
