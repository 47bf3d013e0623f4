"""Lines put together from chunks: every byte once, never split inside a line, whatever the chunks are."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jobrunner import Stream
from jobrunner.output import Chunk, Line, LineAssembler

PIECES = st.lists(
    st.tuples(st.sampled_from(list(Stream)), st.binary(min_size=1, max_size=40).map(lambda b: b.replace(b"a", b"\n")))
)


def assemble(pieces: list[tuple[Stream, bytes]], max_line: int) -> list[Line]:
    assembler, lines, offset = LineAssembler(max_line), [], 0
    for stream, data in pieces:
        lines += assembler.feed(Chunk(stream, data, offset, 0.0))
        offset += len(data)
    return lines + assembler.finish()


@given(PIECES)
def test_lines_of_each_stream_are_what_splitting_its_bytes_gives(pieces: list[tuple[Stream, bytes]]) -> None:
    lines = assemble(pieces, 1 << 20)
    for stream in Stream:
        whole = b"".join(data for its, data in pieces if its is stream)
        expected = [part + b"\n" for part in whole.split(b"\n")[:-1]] + [part for part in whole.split(b"\n")[-1:] if part]
        assert [line.data for line in lines if line.stream is stream] == expected


@given(PIECES, st.integers(1, 7))
def test_a_line_longer_than_the_bound_comes_in_pieces_of_that_size(pieces: list[tuple[Stream, bytes]], bound: int) -> None:
    lines = assemble(pieces, bound)
    for stream in Stream:
        whole = b"".join(data for its, data in pieces if its is stream)
        assert b"".join(line.data for line in lines if line.stream is stream) == whole
    assert all(len(line.data) <= bound for line in lines)


TEXTS = st.lists(
    st.tuples(
        st.sampled_from(list(Stream)),
        st.text("aé€😀\r\n", min_size=1, max_size=20).map(str.encode),
        st.integers(0, 30),
        st.booleans(),
    )
)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(5, 12))
def test_pieces_of_a_line_tear_no_character_and_no_crlf_apart(texts: list[tuple[Stream, bytes, int, bool]], bound: int) -> None:
    assembler, lines, offset = LineAssembler(bound), list[Line](), 0
    model: dict[int, tuple[Stream, int, float]] = {}
    for stream, data, cut, flush in texts:
        for part in filter(None, (data[:cut], data[cut:])):
            lines += assembler.feed(Chunk(stream, part, offset, offset / 2))
            model |= {offset + index: (stream, byte, offset / 2) for index, byte in enumerate(part)}
            offset += len(part)
        if flush:
            lines += assembler.flush()
    lines += assembler.finish()
    for stream in Stream:
        before = b"\n"
        for line in [line for line in lines if line.stream is stream]:
            line.data.decode()
            assert len(line.data) <= bound
            assert b"\n" not in line.data[:-1]
            assert not (before.endswith(b"\r") and line.data.startswith(b"\n"))
            assert line.continues is not before.endswith(b"\n")
            assert model[line.offset] == (stream, line.data[0], line.time)
            before = line.data
        whole = b"".join(data for its, data, _, _ in texts if its is stream)
        assert b"".join(line.data for line in lines if line.stream is stream) == whole


def test_bytes_that_are_no_text_are_cut_at_the_bound() -> None:
    lines = assemble([(Stream.STDOUT, b"\x80" * 20)], 8)
    assert [len(line.data) for line in lines] == [8, 8, 4]


def test_a_line_knows_where_it_began() -> None:
    lines = assemble([(Stream.STDOUT, b"ab"), (Stream.STDERR, b"x\n"), (Stream.STDOUT, b"c\nd\n")], 100)
    assert [(line.data, line.offset) for line in lines] == [(b"x\n", 2), (b"abc\n", 0), (b"d\n", 6)]
