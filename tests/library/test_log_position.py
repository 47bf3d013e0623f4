"""The last lines, and from and until a time: on any log, with any part of it missing, against a model of plain bytes."""

from __future__ import annotations

import asyncio
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobrunner import Gap, Stream
from jobrunner.errors import InvalidRequest
from jobrunner.log import position
from jobrunner.log.segments import list_segments
from jobrunner.output import Begin, Chunk, Selection
from tests.library.test_log_reader import Owner, collect, open_log, read_for_client, text
from tests.support.logwriter import LogWriter

CLOCK = 1_700_000_000
MS = 1_000_000


def ended_log(directory: Path, *writes: tuple[str, bytes], segment_bytes: int = 1 << 20) -> LogWriter:
    """A log that is complete, one write each second from CLOCK + 1 on."""
    writer = LogWriter(directory / "log", segment_bytes)
    for stream, data in writes:
        writer.write(stream, data, 1000 * MS)
    writer.end()
    return writer


async def read(writer: LogWriter, **selection: object) -> list[Chunk | Gap]:
    owner = Owner()
    owner.end()
    with open_log(writer.directory, owner) as log:
        return await collect(log.reader(Selection(**selection)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tail", "expected"),
    [(0, b""), (1, b"four"), (2, b"three\nfour"), (4, b"one\ntwo\nthree\nfour"), (9, b"one\ntwo\nthree\nfour")],
)
async def test_the_last_lines_and_a_last_one_without_newline_counts(tmp_path: Path, tail: int, expected: bytes) -> None:
    writer = ended_log(tmp_path, ("stdout", b"one\ntw"), ("stdout", b"o\nthree\nfo"), ("stdout", b"ur"))
    assert text(await read(writer, tail=tail)) == expected


async def test_lines_of_two_streams_are_whole_although_they_are_written_in_turns(tmp_path: Path) -> None:
    writer = ended_log(tmp_path, ("stderr", b"old\nfirst "), ("stdout", b"a\nb\n"), ("stderr", b"half\n"), ("stdout", b"c\n"))
    parts = await read(writer, tail=2)
    assert text(parts, Stream.STDERR) == b"first half\n"
    assert text(parts, Stream.STDOUT) == b"c\n"


async def test_the_last_lines_of_one_stream(tmp_path: Path) -> None:
    writer = ended_log(tmp_path, ("stdout", b"a\nb\n"), ("stderr", b"x\ny\nz\n"), ("stdout", b"c\n"))
    assert text(await read(writer, tail=2, streams={Stream.STDOUT})) == b"b\nc\n"


async def test_fewer_lines_than_asked_for_tell_what_is_missing_before_them(tmp_path: Path) -> None:
    writer = ended_log(tmp_path, ("stdout", b"gone\n"), ("stdout", b"kept\n"), segment_bytes=5)
    for name in ("0000000000000000", "0000000000000000.idx"):
        (writer.directory / name).unlink()
    assert (await read(writer, tail=1)) == [Chunk(Stream.STDOUT, b"kept\n", 5, CLOCK + 2)]
    assert (await read(writer, tail=2))[0] == Gap(0, 4, "dropped")


async def test_a_follower_of_the_last_lines_gets_what_is_written_after_them(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    writer.write("stdout", b"one\ntwo\n")
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection(tail=1)) as reader:
            assert await reader.locate() == Begin(4, 4, 8)
            writer.write("stdout", b"three\n")
            writer.end()
            owner.end()
            assert text(await collect(reader)) == b"two\nthree\n"


async def test_no_lines_at_all_and_what_comes_after(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    writer.write("stdout", b"unfin")
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection(tail=0)) as reader:
            await reader.locate()
            writer.write("stdout", b"ished\n")
            writer.end()
            owner.end()
            assert text(await collect(reader)) == b"ished\n"


async def test_from_a_time_and_until_a_time(tmp_path: Path) -> None:
    writer = ended_log(tmp_path, *(("stdout", b"%d" % second) for second in range(1, 10)), segment_bytes=2)
    assert text(await read(writer, since=CLOCK + 4)) == b"456789"
    assert text(await read(writer, until=CLOCK + 4)) == b"123"
    assert text(await read(writer, since=CLOCK + 2.5, until=CLOCK + 6.0001)) == b"3456"
    assert text(await read(writer, since=CLOCK + 2, until=CLOCK + 6, tail=1)) == b"2345"
    assert text(await read(writer, since=CLOCK + 20)) == b""
    assert text(await read(writer, until=CLOCK)) == b""


async def test_what_is_written_before_a_time_to_come_is_passed_over(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=4), Owner()
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection(since=CLOCK + 3)) as reader:
            await reader.locate()
            for number in range(1, 6):
                writer.write("stdout", b"%d\n" % number, 1000 * MS)
            writer.end()
            owner.end()
            assert text(await collect(reader)) == b"3\n4\n5\n"


async def test_a_follower_that_has_caught_up_ends_by_the_clock(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    writer.write("stdout", b"early")
    moment = time.time() + 0.3
    with open_log(writer.directory, owner) as log:
        reader = log.reader(Selection(until=moment))
        with anyio.fail_after(5):
            parts = [part async for part in reader]
    assert text(parts) == b"early"
    assert time.time() >= moment
    assert reader.end is not None
    assert reader.end.total_bytes == 5
    assert reader.end.info is not None
    assert reader.end.info.status == "running"


async def test_exact_times_give_each_record_its_own_chunk(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    for number in range(3):
        writer.write("stdout", b"%d\n" % number, 2 * MS)
    writer.end()
    owner.end()
    with open_log(writer.directory, owner) as log:
        together = await collect(log.reader(Selection()))
        apart = await collect(log.reader(Selection(exact_times=True)))
    assert [part.data for part in together if isinstance(part, Chunk)] == [b"0\n1\n2\n"]
    times = [(part.data, round((part.time - CLOCK) * 1000)) for part in apart if isinstance(part, Chunk)]
    assert times == [(b"0\n", 2), (b"1\n", 4), (b"2\n", 6)]


async def test_a_time_that_was_told_is_the_time_of_what_it_was_told_of(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log")
    for number in range(100):
        writer.write("stdout", b"%02d" % number, 60_000_777)
    writer.end()
    for part in await read(writer, exact_times=True):
        assert isinstance(part, Chunk)
        assert text(await read(writer, since=part.time))[:2] == part.data
        assert text(await read(writer, until=part.time)) == text(await read(writer))[: part.offset]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"offset": -1}, "offset"),
        ({"offset": 1 << 63}, "offset"),
        ({"tail": -1}, "tail"),
        ({"tail": 3, "offset": 7}, "tail"),
        ({"since": -1.0}, "since"),
        ({"since": float("nan")}, "since"),
        ({"until": 1e12}, "until"),
        ({"since": 2.0, "until": 1.0}, "until"),
    ],
)
def test_a_selection_that_cannot_be_names_its_field(fields: dict[str, float], name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"cannot read log: {name}: ") as caught:
        Selection(**fields)  # type: ignore[arg-type]
    assert caught.value.field == name


def test_the_last_lines_of_a_log_without_newlines_take_little_memory(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log", segment_bytes=16 << 20)
    for _ in range(100):
        writer.write("stdout", b"x" * (1 << 20))
    writer.write("stdout", b"\nlast")
    tracemalloc.start()
    try:
        assert position.begin(writer.directory, Selection(tail=2), lambda: False) == Begin(0, 0, writer.offset)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_a_search_that_is_cancelled_stops(tmp_path: Path) -> None:
    writer = ended_log(tmp_path, *(("stdout", b"line\n"),) * 1000)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 10

    position.begin(writer.directory, Selection(tail=10**9), cancelled)
    assert asked == 11


@dataclass
class Byte:
    """One byte of the model; `value` is None if it is missing."""

    stream: Stream | None
    value: int | None
    time_ns: int


@dataclass
class Model:
    data: list[Byte] = field(default_factory=list)

    def first(self, at_ns: int, kinds: tuple[bool, ...] = (True, False), start: int = 0) -> int:
        """Offset of the first byte of this time or later; the end if there is none. `kinds`: missing or not."""
        found = (
            offset
            for offset, byte in enumerate(self.data)
            if offset >= start and byte.time_ns >= at_ns and (byte.value is None) in kinds
        )
        return next(found, len(self.data))

    def lines(self, streams: frozenset[Stream], start: int, stop: int) -> list[list[int]]:
        """Offsets of each line's bytes, in the order of their last ones."""
        lines: list[list[int]] = []
        partial: dict[Stream, list[int]] = {}
        for offset in range(start, stop):
            byte = self.data[offset]
            if byte.stream is None:
                lines += partial.values()
                partial = {}
            elif byte.stream in streams:
                partial.setdefault(byte.stream, []).append(offset)
                if byte.value == ord("\n"):
                    lines.append(partial.pop(byte.stream))
        return sorted([*lines, *partial.values()], key=lambda line: line[-1])

    def expected(self, selection: Selection) -> dict[int, Byte]:
        start = selection.offset
        if selection.since is not None:
            start = max(start, self.first(round(selection.since * 1e6) * 1000))
        until_ns = None if selection.until is None else round(selection.until * 1e6) * 1000
        starts = dict.fromkeys(Stream, start)
        if selection.tail is not None:
            stop = len(self.data) if until_ns is None else self.first(until_ns)
            lines = self.lines(selection.streams, start, stop)
            if len(lines) >= selection.tail:
                chosen = lines[len(lines) - selection.tail :]
                starts = dict.fromkeys(Stream, max(start, stop))
                for line in chosen:
                    stream = self.data[line[0]].stream
                    assert stream is not None
                    starts[stream] = min(starts[stream], line[0])
                start = min(starts[stream] for stream in selection.streams)
        end = len(self.data) if until_ns is None else self.first(until_ns, (False,), start)
        return {
            offset: byte
            for offset, byte in enumerate(self.data[:end])
            if offset >= start and (byte.stream is None or (byte.stream in selection.streams and offset >= starts[byte.stream]))
        }


WRITES = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["stdout", "stderr"]),
            st.binary(min_size=1, max_size=40).map(lambda data: data.replace(b"a", b"\n").replace(b"\0", b"\n")),
            st.integers(0, 100).map(lambda ms: ms * MS),
        ),
        st.tuples(st.just("lose"), st.integers(1, 20), st.just(0)),
    ),
    max_size=40,
)
TIMES = st.none() | st.integers(0, 2000).map(lambda ms: CLOCK + ms / 1000)


@settings(max_examples=300, deadline=None)
@given(
    writes=WRITES,
    segment=st.integers(1, 200),
    dropped=st.integers(0, 3),
    streams=st.sampled_from([frozenset(Stream), *(frozenset({stream}) for stream in Stream)]),
    tail=st.none() | st.integers(0, 12),
    offset=st.integers(0, 300),
    times=st.tuples(TIMES, TIMES),
    exact=st.booleans(),
)
def test_model_any_selection_of_any_log_equals_the_bytes(
    writes: list[tuple[str, bytes | int, int]],
    segment: int,
    dropped: int,
    streams: frozenset[Stream],
    tail: int | None,
    offset: int,
    times: tuple[float | None, float | None],
    exact: bool,
) -> None:
    since, until = sorted(times) if None not in times else times  # type: ignore[type-var]
    with tempfile.TemporaryDirectory() as directory:
        writer, model = write(Path(directory), writes, segment, dropped)
        start = 0 if tail is not None else min(offset, len(model.data))
        selection = Selection(offset=start, streams=streams, tail=tail, since=since, until=until, exact_times=exact)
        parts = asyncio.run(read_selected(writer.directory, selection))
    seen: dict[int, int | None] = {}
    for part in parts:
        if isinstance(part, Gap):
            seen |= dict.fromkeys(range(part.first, part.last + 1))
        else:
            seen |= {part.offset + index: byte for index, byte in enumerate(part.data)}
            assert {model.data[part.offset + index].stream for index in range(len(part.data))} == {part.stream}
            if exact:
                assert {model.data[part.offset + index].time_ns for index in range(len(part.data))} == {
                    round(part.time * 1000) * MS
                }
    assert seen == {offset: byte.value for offset, byte in model.expected(selection).items()}
    assert list(seen) == sorted(seen)


def write(directory: Path, writes: list[tuple[str, bytes | int, int]], segment: int, dropped: int) -> tuple[LogWriter, Model]:
    """A log of these writes without its oldest segments, and its model: what is missing has the time of what comes next."""
    writer, model = LogWriter(directory / "log", segment), Model()
    for kind, what, after in writes:
        if isinstance(what, int):
            writer.lose(what)
            model.data += [Byte(None, None, writer.clock) for _ in range(what)]
        else:
            writer.write(kind, what, after)
            model.data += [Byte(Stream(kind), byte, writer.clock) for byte in what]
    writer.end()
    bases = list_segments(writer.directory)
    for base in bases[: min(dropped, len(bases) - 1)]:
        (writer.directory / f"{base:016x}").unlink()
        (writer.directory / f"{base:016x}.idx").unlink()
    first = list_segments(writer.directory)[0]
    # The first kept segment begins with a gap record if bytes before it were lost, or with what was written to it.
    next_ns = model.data[first - 1].time_ns if first and model.data[first - 1].stream is None else 0
    next_ns = next_ns or (model.data[first].time_ns if first < len(model.data) else writer.clock)
    for offset in range(first):
        model.data[offset] = Byte(None, None, next_ns)
    return writer, model


async def read_selected(directory: Path, selection: Selection) -> list[Chunk | Gap]:
    owner = Owner()
    owner.end()
    with open_log(directory, owner) as log:
        return (await read_for_client(log, selection))[1]
