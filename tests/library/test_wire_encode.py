"""Bytes that are written by hand are those of the generated code and of official protobuf."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobrunner.job import Gap, JobInfo, JobStatus, Stream
from jobrunner.log.chunks import BLOCK, LARGE
from jobrunner.output import Begin, Chunk, End
from jobrunner.wire import messages as pb
from jobrunner.wire.codec import MalformedMessage, StrictCodec
from jobrunner.wire.convert import output_from_wire, output_to_wire
from jobrunner.wire.encode import Encoded, decode_output, encode_chunk, encode_output
from jobrunner.wire.write import varint
from tests.support.protobuf import official

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy host is no failure."""

times = st.integers(0, 4_000_000_000_000_000).map(lambda micros: micros / 1_000_000)
chunks = st.builds(Chunk, st.sampled_from(Stream), st.binary(max_size=300), st.integers(0, (1 << 64) - 1), times)


@UNHURRIED
@given(chunks)
def test_a_chunk_has_the_bytes_of_the_generated_code_and_of_official_protobuf(chunk: Chunk) -> None:
    raw = encode_chunk(chunk).raw
    assert raw == bytes(output_to_wire(chunk))
    assert raw == official()["jobrunner.v1.JobOutputResponse"].FromString(raw).SerializeToString()


def test_a_chunk_is_encoded_once_for_all_its_followers() -> None:
    chunk = Chunk(Stream.STDOUT, b"data", 7, 1.5)
    assert encode_chunk(chunk).raw is encode_chunk(chunk).raw
    assert chunk == Chunk(Stream.STDOUT, b"data", 7, 1.5)


@UNHURRIED
@given(chunks, st.integers(0, 400), st.binary(max_size=3))
def test_a_message_is_the_chunk_that_the_generated_code_finds_in_it(chunk: Chunk, at: int, other: bytes) -> None:
    """Also one that is not as we write it, or is no message at all."""
    whole = encode_chunk(chunk).raw
    for raw in (whole, whole[:at] + other + whole[at:], whole[:at] + other + whole[at + len(other) :], whole[:at], other):
        try:
            expected = output_from_wire(StrictCodec().decode(raw, pb.JobOutputResponse))
        except MalformedMessage:
            with pytest.raises(MalformedMessage):
                decode_output(Encoded(raw))
        else:
            assert decode_output(Encoded(raw)) == expected


@pytest.mark.parametrize("size", [1, 127, 128, 16383, 16384, BLOCK, LARGE])
def test_a_chunk_of_any_length_comes_back_the_same(size: int) -> None:
    chunk = Chunk(Stream.STDERR, bytes(size - 1) + b"x", 1 << 40, 1_700_000_000.000001)
    message = StrictCodec().decode(encode_chunk(chunk).raw, pb.JobOutputResponse)
    assert output_from_wire(message) == chunk
    assert decode_output(encode_chunk(chunk)) == chunk


@pytest.mark.parametrize(
    "part", [Gap(5, 9, "dropped"), End(10), End(10, JobInfo("0123456789ab", JobStatus.FAILED, "ls")), Begin(3, 3, 7)]
)
def test_gaps_the_beginning_and_the_end_are_messages_too(part: Gap | End | Begin) -> None:
    assert decode_output(encode_output(part)) == part


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, (1 << 32) - 1, (1 << 64) - 1])
def test_numbers_are_base_128_with_the_lowest_digit_first(value: int) -> None:
    digits = varint(value)
    assert sum((digit & 0x7F) << 7 * place for place, digit in enumerate(digits)) == value
    assert all(digit & 0x80 for digit in digits[:-1])
    assert digits[-1] < 0x80


def test_the_codec_sends_encoded_bytes_as_they_are() -> None:
    assert StrictCodec().encode(Encoded(b"abc"), Encoded) == b"abc"
