"""A message of very many fields is refused before betterproto2, whose time would grow with their square, sees it."""

from __future__ import annotations

import time

import pytest

from jobrunner.wire import messages as pb
from jobrunner.wire.codec import MalformedMessage, StrictCodec

UNKNOWN = b"\xf8\x07\x01"
"""Field 127, a varint."""
JOB_ID = b"\x0a\x01a"
ARG = b"\x12\x00"


@pytest.mark.parametrize(
    ("data", "message_type"),
    [
        (UNKNOWN * 150_000, pb.JobQueryRequest),
        (JOB_ID * 1_000_000, pb.JobQueryRequest),
        (b"\x0a\x01a" + ARG * 1_000_000, pb.JobStartRequest),
        (b"\x32\xff\x7f" + b"\x60\x01" * 8191 + b"\x00", pb.JobStartRequest),
    ],
)
def test_a_flood_of_fields_is_refused_at_once(data: bytes, message_type: type) -> None:
    begun = time.process_time()
    with pytest.raises(MalformedMessage):
        StrictCodec().decode(data, message_type)
    assert time.process_time() - begun < 1


def test_what_a_large_request_needs_is_let_through() -> None:
    message = pb.JobStartRequest(command="x", args=["a"] * 20_000, env={f"NAME{number}": "x" for number in range(10_000)})
    assert StrictCodec().decode(bytes(message), pb.JobStartRequest) == message
