"""Frames that are taken apart without h2's buffer are to h2 what they would have been: the same events, answers and errors."""

from __future__ import annotations

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import FrameTooLargeError, ProtocolError
from hyperframe.frame import DataFrame, Frame, HeadersFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from jobrunner.client.frames import FrameBuffer

MAX_FRAME = 16384
HEADERS = [(":status", "200"), ("content-type", "application/grpc+proto")]
PARTS = st.lists(
    st.one_of(
        st.tuples(st.just("data"), st.integers(0, 3000), st.none() | st.integers(0, 255)),
        st.tuples(st.just("ping"), st.just(0), st.none()),
        st.tuples(st.just("window"), st.integers(1, 1000), st.none()),
        st.tuples(st.just("settings"), st.integers(1, 100), st.none()),
    ),
    max_size=12,
)


def client() -> H2Connection:
    """One that has made two calls."""
    h2 = H2Connection(H2Configuration(client_side=True, header_encoding="ascii"))
    h2.initiate_connection()
    for stream in (1, 3):
        h2.send_headers(stream, [(":method", "POST"), (":scheme", "https"), (":path", "/x"), (":authority", "y")], end_stream=True)
    return h2


def answers(parts: list[tuple[str, int, int | None]]) -> bytes:
    """What a server says to it."""
    server = H2Connection(H2Configuration(client_side=False))
    server.initiate_connection()
    server.receive_data(client().data_to_send())
    for stream in (1, 3):
        server.send_headers(stream, HEADERS)
    for number, (what, size, padding) in enumerate(parts):
        stream = (1, 3)[number % 2]
        if what == "data":
            server.send_data(stream, bytes([number]) * size, pad_length=padding)
        elif what == "ping":
            server.ping(b"12345678")
        elif what == "window":
            server.increment_flow_control_window(size, stream)
        else:
            server.update_settings({3: size})
    server.send_headers(1, [("grpc-status", "0")], end_stream=True)
    server.send_data(3, b"last", end_stream=True)
    return server.data_to_send()


def by_buffer(h2: H2Connection, data: bytes, cuts: list[int]) -> list[str]:
    """The events of these bytes, which come in pieces that end at these places."""
    frames, events, at = FrameBuffer(MAX_FRAME), list[str](), 0
    for stop in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        while at < stop:
            room = frames.room()
            count = min(len(room), stop - at)
            room[:count] = data[at : at + count]
            frames.add(count)
            at += count
            events += [repr(event) for found in frames.receive(h2) for event in found]
    return events


@settings(deadline=None)
@given(PARTS, st.lists(st.integers(0, 1 << 16), max_size=20))
def test_any_frames_in_any_pieces_are_the_same_to_h2(parts: list[tuple[str, int, int | None]], cuts: list[int]) -> None:
    data, plain, ours = answers(parts), client(), client()
    assert by_buffer(ours, data, cuts) == [repr(event) for event in plain.receive_data(data)]
    assert ours.data_to_send() == plain.data_to_send()
    assert ours.inbound_flow_control_window == plain.inbound_flow_control_window


def test_a_frame_of_the_greatest_length_fits() -> None:
    h2 = client()
    begin = answers([])[: -len(DataFrame(3, b"last").serialize())]
    events = by_buffer(h2, begin + DataFrame(3, bytes(MAX_FRAME)).serialize(), [])
    assert events[-1].startswith("<DataReceived stream_id:3, flow_controlled_length:16384")


def long_frame() -> bytes:
    return (MAX_FRAME + 1).to_bytes(3, "big") + bytes([0, 0, 0, 0, 0, 3])


def in_a_block() -> bytes:
    return HeadersFrame(3, b"\x88").serialize() + DataFrame(3, b"x").serialize()


@pytest.mark.parametrize(
    ("frames", "error", "code"),
    [
        (long_frame(), FrameTooLargeError, ErrorCodes.FRAME_SIZE_ERROR),
        (in_a_block(), ProtocolError, ErrorCodes.PROTOCOL_ERROR),
        (DataFrame(5, b"x").serialize(), ProtocolError, ErrorCodes.PROTOCOL_ERROR),
        (b"\0\0\x01\x06\0\0\0\0\0x", ProtocolError, None),
        (DataFrame(3, bytes(16000)).serialize() * 5, ProtocolError, ErrorCodes.FLOW_CONTROL_ERROR),
    ],
    ids=["too-long", "within-headers", "no-such-stream", "bad-ping", "past-the-window"],
)
def test_what_is_an_error_to_h2_is_one_here(frames: bytes, error: type[ProtocolError], code: ErrorCodes | None) -> None:
    h2, begin = client(), answers([])
    h2.receive_data(begin[: -len(DataFrame(3, b"last").serialize())])
    h2.data_to_send()
    with pytest.raises(error):
        by_buffer(h2, frames, [7])
    goodbye = h2.data_to_send()[-17:]
    assert goodbye[3] == 7, "GOAWAY"
    assert code is None or int.from_bytes(goodbye[-4:], "big") == code


def test_data_of_a_call_that_was_given_up_is_passed_over() -> None:
    h2, begin = client(), answers([])
    h2.receive_data(begin[: -len(DataFrame(3, b"last").serialize())])
    h2.reset_stream(3)
    h2.data_to_send()
    assert by_buffer(h2, DataFrame(3, b"late").serialize(), []) == []
    answer, _ = Frame.parse_frame_header(memoryview(h2.data_to_send()[-13:][:9]))
    assert answer.type == 3, "RST_STREAM once more"
