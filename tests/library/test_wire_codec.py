"""What is no message is refused, before betterproto2 can make one of it."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobrunner.wire import messages as pb
from jobrunner.wire.codec import MalformedMessage, StrictCodec
from tests.support.protobuf import filled, official

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy host is no failure."""

START = filled(official()["jobrunner.v1.JobStartRequest"]).SerializeToString()
BAD = {
    "garbage": b"\xff\xff\xff",
    "varint of eleven bytes": b"\x10" + b"\xff" * 10 + b"\x01",
    "number in place of a text": b"\x08\x05",
    "text in place of a number": b"\x0a\x01a\x48" + b"\x80",
    "text in place of a bool": b"\x4a\x01a",
    "fixed number in place of a text": b"\x0d\x00\x00\x00\x00",
    "text longer than the message": b"\x0a\x05ab",
    "field number zero": b"\x02\x01a",
    "group": b"\x0b\x0c",
    "wire type seven": b"\x0f\x00",
    "text that is not UTF-8": b"\x0a\x02\xff\xfe",
    "number in place of a message": b"\x30\x01",
    "garbage in a message": b"\x32\x02\xff\xff",
    "wrong type in a message": b"\x32\x02\x08\x01",
    "wrong type in a map": b"\x22\x02\x08\x01",
    "unknown field that is too long": b"\xfa\x07\x05a",
}


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in BAD.items()])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage, match="cannot parse "):
        StrictCodec().decode(data, pb.JobStartRequest)


def test_a_duration_that_python_cannot_hold_is_refused() -> None:
    duration = b"\x08" + b"\xff" * 7 + b"\x7f"
    with pytest.raises(MalformedMessage, match="cannot parse JobStopRequest"):
        StrictCodec().decode(b"\x12" + bytes([len(duration)]) + duration, pb.JobStopRequest)


@pytest.mark.parametrize("length", range(1, len(START)))
def test_a_message_that_ends_too_early_is_refused_or_a_shorter_message(length: int) -> None:
    try:
        message = StrictCodec().decode(START[:length], pb.JobStartRequest)
    except MalformedMessage:
        return
    assert official()["jobrunner.v1.JobStartRequest"].FromString(START[:length]).SerializeToString() == bytes(message)


@UNHURRIED
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else_than_malformed_message(data: bytes) -> None:
    for message_type in (pb.JobStartRequest, pb.JobInfo, pb.JobSubscriptionRequest, pb.JobListResponse):
        with suppress(MalformedMessage):
            StrictCodec().decode(data, message_type)


def test_fields_of_a_newer_version_are_skipped() -> None:
    newer = b"\xf8\x07\x05" + b"\xfa\x07\x03abc" + b"\xfd\x07\x00\x00\x00\x00" + b"\xf9\x07" + bytes(8)
    message = StrictCodec().decode(b"\x0a\x02ls" + newer, pb.JobStartRequest)
    assert message.command == "ls"


@pytest.mark.parametrize("data", [b"\x22\x02\x01\x02", b"\x20\x01\x20\x02"], ids=["packed", "one by one"])
def test_repeated_numbers_are_read_in_both_forms(data: bytes) -> None:
    message = StrictCodec().decode(data, pb.JobSubscriptionRequest)
    assert message.streams == [pb.OutputStream.STDOUT, pb.OutputStream.STDERR]


def test_packed_numbers_that_end_within_one_are_refused() -> None:
    with pytest.raises(MalformedMessage, match="ends within a varint"):
        StrictCodec().decode(b"\x22\x02\x01\x82", pb.JobSubscriptionRequest)


def test_a_message_of_another_type_is_not_sent() -> None:
    with pytest.raises(TypeError, match="JobStopRequest is not JobStartRequest"):
        StrictCodec().encode(pb.JobStopRequest(), pb.JobStartRequest)
