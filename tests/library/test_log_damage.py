"""Damaged indexes: whatever bits of them are flipped, no byte is shown that is not the stream's, and none is missing untold."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jobrunner import Gap, Stream
from jobrunner.output import Begin, Chunk, Selection
from tests.library.test_log_reader import Owner, open_log, read_for_client
from tests.support.logwriter import RECORD, LogWriter

pytestmark = pytest.mark.timeout(240)

CLOCK = 1_700_000_000
SECOND = 1_000_000_000
BOTH = frozenset(Stream)


class Written:
    """What was written: each byte with its stream and time; `None` for one that was lost in the writing."""

    def __init__(self, directory: Path, segment_bytes: int) -> None:
        self.writer = LogWriter(directory, segment_bytes)
        self.bytes: list[tuple[Stream, int, float] | None] = []

    def write(self, stream: Stream, data: bytes) -> None:
        self.writer.write(str(stream), data, SECOND)
        self.bytes += [(stream, byte, self.writer.clock / SECOND) for byte in data]

    def lose(self, count: int) -> None:
        self.writer.lose(count)
        self.bytes += [None] * count

    def indexes(self) -> list[Path]:
        return sorted(self.writer.directory.glob("*.idx"))


async def read(written: Written, selection: Selection) -> tuple[Begin, list[Chunk | Gap]]:
    owner = Owner()
    owner.log_end = len(written.bytes)
    owner.end()
    with open_log(written.writer.directory, owner) as log:
        return await read_for_client(log, selection)


def check(written: Written, selection: Selection, begin: Begin, parts: list[Chunk | Gap]) -> None:
    at, told = begin.offset, set[int]()
    for part in parts:
        first = part.first if isinstance(part, Gap) else part.offset
        assert first >= at, "backwards"
        at = part.last + 1 if isinstance(part, Gap) else part.next_offset
        assert at > first
        told.update(range(first, at))
        if isinstance(part, Chunk):
            shown = [(part.stream, byte) for byte in part.data]
            assert shown == [byte[:2] if byte else None for byte in written.bytes[first:at]], "not what was written"
    for offset in range(begin.offset, len(written.bytes)):
        byte = written.bytes[offset]
        if byte is None or byte[0] not in selection.streams or offset < begin.of(byte[0]):
            continue
        if (selection.since or 0) <= byte[2] < (selection.until or 1e12):
            assert offset in told, f"byte {offset} is missing untold"


WRITES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(Stream), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just(None), st.integers(1, 50)),
    ),
    min_size=1,
    max_size=40,
)
TIMES = st.none() | st.integers(0, 45).map(lambda seconds: float(CLOCK + seconds))
STREAMS = st.sampled_from([BOTH, frozenset({Stream.STDOUT}), frozenset({Stream.STDERR})])


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    since, until = draw(TIMES), draw(TIMES)
    if since is not None and until is not None and until < since:
        since, until = until, since
    tail = draw(st.none() | st.integers(0, 5))
    offset = 0 if tail is not None else draw(st.integers(0, 200))
    return Selection(
        offset=offset,
        follow=draw(st.booleans()),
        streams=draw(STREAMS),
        tail=tail,
        since=since,
        until=until,
        exact_times=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink])
@given(
    writes=WRITES,
    segment=st.integers(10, 400),
    ended=st.booleans(),
    flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, RECORD.size * 8 - 1)), max_size=6),
    cuts=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 100)), max_size=2),
    wanted=st.lists(selections(), min_size=3, max_size=6),
)
def test_no_byte_is_missing_untold_and_none_is_wrong_whatever_is_flipped_in_indexes_or_cut_off(
    writes: list[tuple[Stream | None, bytes | int]],
    segment: int,
    ended: bool,
    flips: list[tuple[int, int]],
    cuts: list[tuple[int, int]],
    wanted: list[Selection],
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        written = Written(Path(directory) / "log", segment)
        for stream, what in writes:
            if stream is None:
                assert isinstance(what, int)
                written.lose(what)
            else:
                assert isinstance(what, bytes)
                written.write(stream, what)
        if ended:
            written.writer.end()
        for where, bit in flips:
            flip(written, where, bit)
        for where, count in cuts:
            cut(written, where, count)
        asyncio.run(read_all(written, [selection for selection in wanted if selection.offset <= len(written.bytes)]))


async def read_all(written: Written, wanted: list[Selection]) -> None:
    for selection in wanted:
        check(written, selection, *await read(written, selection))


def flip(written: Written, where: int, bit: int) -> None:
    """One bit of one record of all that there are."""
    records = [(index, at) for index in written.indexes() for at in range(index.stat().st_size // RECORD.size)]
    if records:
        index, at = records[where % len(records)]
        raw = bytearray(index.read_bytes())
        raw[at * RECORD.size + bit // 8] ^= 1 << bit % 8
        index.write_bytes(raw)


def cut(written: Written, where: int, count: int) -> None:
    """So many bytes off the end of one file, an index or data."""
    files = sorted(written.writer.directory.iterdir())
    file = files[where % len(files)]
    os.truncate(file, max(0, file.stat().st_size - count))


@pytest.mark.parametrize("streams", [BOTH, {Stream.STDOUT}, {Stream.STDERR}], ids=["both", "stdout", "stderr"])
async def test_every_bit_of_every_record(tmp_path: Path, streams: frozenset[Stream]) -> None:
    written = Written(tmp_path / "log", 12)
    for number in range(4):
        written.write(Stream.STDERR if number % 2 else Stream.STDOUT, b"%d\n" % number * 2)
    written.lose(5)
    written.write(Stream.STDERR, b"last")
    written.writer.end()
    for where in range(7):
        for bit in range(RECORD.size * 8):
            flip(written, where, bit)
            selection = Selection(streams=frozenset(streams))
            check(written, selection, *await read(written, selection))
            flip(written, where, bit)
