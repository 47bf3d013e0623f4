"""The log where one piece ends and another begins, and where there is very much of something: records, readers, nothing at all."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from pathlib import Path

import pytest

from jobrunner import Gap, Stream
from jobrunner.errors import JobNotFound
from jobrunner.log import ChunkCache
from jobrunner.log.chunks import BLOCK, LARGE
from jobrunner.log.cursor import PASSES
from jobrunner.log.segments import DATA, RECORD, Record
from jobrunner.output import MAX_LINE, Chunk, Line, OutputReader, Selection
from tests.library.test_log_reader import Owner, collect, open_log, text
from tests.support.logwriter import LogWriter, pack
from tests.support.timing import fail_after

MS = 1_000_000
OTHERS = 100_000
BORDERS = (16 << 10, BLOCK, 64 << 10, 128 << 10, 256 << 10, MAX_LINE)
ENDS = ("é\n", "€\r\n", "😀\r\n", "\r\n", "\n", "\0\n", "e\u0301\r\n")


async def read(writer: LogWriter, **selection: object) -> list[Chunk | Gap]:
    owner = Owner()
    owner.log_end = writer.offset
    owner.end()
    with open_log(writer.directory, owner) as log:
        return await collect(log.reader(Selection(**selection)))  # type: ignore[arg-type]


async def lines_of(reader: OutputReader) -> list[Line]:
    lines = list[Line]()
    with fail_after(20):
        async with reader:
            while (line := await reader.next_line()) is not None:
                lines.append(line)
    return lines


@pytest.mark.parametrize("piece", [1 << 20, BLOCK, 16384, 4093])
async def test_no_character_and_no_crlf_is_torn_at_any_border(tmp_path: Path, piece: int) -> None:
    """Lines whose last characters lie across each border at which something is cut, at every byte of them."""
    data, wanted = bytearray(), list[bytes]()
    for border, end, shift in itertools.product(BORDERS, ENDS, range(1, 8)):
        tail = end.encode()
        at = (len(data) // border + 1) * border
        line = b"." * (at - len(data) - shift if at - len(data) > shift else 0) + tail
        if len(data) + len(line) > 24 << 20:
            break
        data += line
        wanted.append(line)
    writer = LogWriter(tmp_path / "log", segment_bytes=5 << 20)
    for start in range(0, len(data), piece):
        writer.write("stdout", bytes(data[start : start + piece]))
    writer.end()
    owner = Owner()
    owner.end()
    with open_log(writer.directory, owner) as log:
        got = await lines_of(log.reader(Selection()))
    whole = list[bytes]()
    for one in got:
        one.data.decode()
        assert len(one.data) <= MAX_LINE
        assert not (one.continues and one.data == b"\n" and whole[-1].endswith(b"\r"))
        if one.continues:
            whole[-1] += one.data
        else:
            whole.append(one.data)
    assert whole == wanted


async def test_a_segment_that_is_exactly_full_is_followed_and_read_from_its_end(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=1000), Owner()
    writer.write("stdout", b"a" * 1000)
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection()) as first, log.reader(Selection(offset=1000)) as at_its_end:
            assert await anext(first) == Chunk(Stream.STDOUT, b"a" * 1000, 0, writer.clock / 1e9)
            waiting = [asyncio.ensure_future(anext(reader)) for reader in (first, at_its_end)]
            await asyncio.sleep(0)
            writer.write("stderr", b"b")
            with fail_after(5):
                parts = await asyncio.gather(*waiting)
            assert [(part.offset, part.data) for part in parts if isinstance(part, Chunk)] == [(1000, b"b")] * 2
            writer.end()
            owner.end()
            assert [part async for part in first] == [part async for part in at_its_end] == []
            assert first.end is not None and first.end.total_bytes == 1001
    assert await read(writer, offset=1001) == []


async def test_an_offset_within_a_gap_is_told_the_rest_of_it(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log", segment_bytes=10)
    writer.write("stdout", b"0123456789")
    writer.write("stdout", b"abcdefghij")
    writer.lose(20)
    writer.write("stdout", b"end")
    writer.end()
    for name in ("000000000000000a", "000000000000000a.idx"):
        (writer.directory / name).unlink()
    dropped, lost, end = Gap(10, 19, "dropped"), Gap(20, 39, "write_error"), b"end"
    parts = {
        offset: [part if isinstance(part, Gap) else part.data for part in await read(writer, offset=offset)]
        for offset in (10, 19, 20, 25, 39, 40)
    }
    assert parts[10] == [dropped, lost, end]
    assert parts[19] == [Gap(19, 19, "dropped"), lost, end]
    assert parts[20] == [lost, end]
    assert parts[25] == [Gap(25, 39, "write_error"), end]
    assert parts[39] == [Gap(39, 39, "write_error"), end]
    assert parts[40] == [end]


@pytest.mark.parametrize("first", [7, 17])
async def test_a_clock_that_was_set_back_gives_each_byte_once(tmp_path: Path, first: int) -> None:
    """Times order nothing then; what is given is still one run of the log, from and up to where a time was reached."""
    writer = LogWriter(tmp_path / "log", segment_bytes=25)
    for number in range(20):
        writer.write("stdout", b"%05d" % number, -15_000 * MS if number == 10 else 1000 * MS)
    writer.end()
    begun = 1_700_000_000
    all_of_it = b"".join(b"%05d" % number for number in range(20))
    for since, until in itertools.product(
        (None, begun - 20, begun + first, begun + 100), (None, begun - 20, begun + first, begun + 100)
    ):
        if since is None or until is None or since <= until:
            got = text(await read(writer, since=since, until=until))
            assert got in all_of_it
            assert len(got) % 5 == 0
    assert text(await read(writer, since=begun - 20)) == all_of_it
    assert text(await read(writer, until=begun + 100)) == all_of_it
    assert text(await read(writer, tail=0, since=begun)) == b""


def many_of_stdout(directory: Path, count: int) -> LogWriter:
    """A log of so many records of stdout, a byte each, and one of stderr at its end."""
    writer = LogWriter(directory / "log", segment_bytes=1 << 40)
    writer.append(writer.data, b"x" * count)
    records = (pack(end, writer.clock + end, DATA, 1, 1) for end in range(1, count + 1))
    writer.append(writer.index, b"".join(records))
    writer.offset, writer.clock = count, writer.clock + count
    writer.write("stderr", b"last")
    return writer


async def test_records_that_are_not_wanted_hold_up_nobody_else(tmp_path: Path) -> None:
    """A job that writes a byte at a time makes millions of them; who wants the other stream passes them over on the loop."""
    writer, owner = many_of_stdout(tmp_path, OTHERS), Owner()
    turns = 0
    with open_log(writer.directory, owner) as log:
        for selection in (Selection(streams=frozenset({Stream.STDERR})), Selection(since=writer.clock / 1e9)):
            async with log.reader(selection) as reader:
                await reader.locate()
                following = asyncio.ensure_future(anext(reader))
                before = turns
                while not following.done():
                    turns += 1
                    await asyncio.sleep(0)
                part = await following
            assert isinstance(part, Chunk) and part.data == b"last"
            assert selection.since is not None or turns - before >= OTHERS // PASSES


async def test_next_nowait_passes_over_all_that_is_not_wanted(tmp_path: Path) -> None:
    writer, owner = many_of_stdout(tmp_path, 10 * PASSES), Owner()
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection(streams=frozenset({Stream.STDERR}))) as reader:
            part = reader.next_nowait()
    assert isinstance(part, Chunk) and part.data == b"last"


async def test_a_thousand_followers_of_one_log_have_every_byte(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=4000), Owner()
    with open_log(writer.directory, owner) as log:
        following = [asyncio.ensure_future(collect(log.reader(Selection()))) for _ in range(1000)]
        for number in range(8):
            writer.write("stdout" if number % 2 else "stderr", b"%d" % number * 999 + b"\n", 100 * MS)
            await asyncio.sleep(0.02)
        writer.end()
        owner.end()
        with fail_after(20):
            got = await asyncio.gather(*following)
    assert {text(parts) for parts in got} == {b"".join(b"%d" % number * 999 + b"\n" for number in range(8))}


async def test_followers_of_a_log_share_its_chunks_and_no_more_is_held_than_the_bound(tmp_path: Path) -> None:
    """Read once from the disk, and encoded once: the chunk itself is the same for all, by the way in which it was cut."""
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=8 << 20), Owner()
    for _ in range(40):
        writer.write("stdout", bytes(BLOCK))
    writer.end()
    owner.end()
    with open_log(writer.directory, owner) as log:
        log.cache = cache = ChunkCache(limit := 1 << 20)
        held = []
        async with log.reader(Selection()) as first, log.reader(Selection()) as second, log.reader(Selection()) as large:
            large.take_at_once(1 << 20)
            async for part in first:
                assert isinstance(part, Chunk)
                assert part is await anext(second)
                assert len(part.data) == BLOCK
                held.append(sum(2 * len(chunk.data) for chunk, _ in cache._entries.values()))
            assert [len(part.data) async for part in large if isinstance(part, Chunk)] == [LARGE] * 20
    assert limit * 3 // 4 < max(held) <= limit


@pytest.mark.parametrize("selection", [Selection(tail=2), Selection(since=1.0), Selection(), Selection(follow=False)])
async def test_a_log_that_was_removed_before_it_is_read_is_not_found(tmp_path: Path, selection: Selection) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    writer.write("stdout", b"gone\n")
    shutil.rmtree(writer.directory)
    owner.end()
    with open_log(writer.directory, owner) as log:
        async with log.reader(selection) as reader:
            with pytest.raises(JobNotFound), fail_after(5):
                await anext(reader)


@pytest.mark.parametrize("last", [True, False], ids=["last-segment", "segment-between"])
@pytest.mark.parametrize("number", [0, 3, 5])
@pytest.mark.parametrize(
    "damage",
    [{"end": 0}, {"end": 1 << 40}, {"end": 1 << 62}, {"kind": 2}, {"kind": 7}, {"stream": 9}],
    ids=["end-before-the-segment", "end-far-ahead", "end-past-any-log", "no-data", "unknown-kind", "unknown-stream"],
)
async def test_a_damaged_record_hides_nothing_silently_and_holds_nobody_up(
    tmp_path: Path, damage: dict[str, int], number: int, last: bool
) -> None:
    """Of a shim whose records have no checksum."""
    writer = LogWriter(tmp_path / "log", checked=False)
    writer.write("stderr", b"first\n" * 9)
    writer.new_segment()
    for line in range(6):
        writer.write("stderr" if line % 2 else "stdout", b"%d\n" % line * 50, after_ns=60 * MS)
    raw, index = bytearray(writer.index.read_bytes()), writer.index
    record = Record(*RECORD.unpack_from(raw, number * RECORD.size))._replace(**damage)
    RECORD.pack_into(raw, number * RECORD.size, *record)
    index.write_bytes(raw)
    if not last:
        writer.new_segment()
        writer.write("stdout", b"last\n" * 9)
    for selection in ({}, {"offset": 60}):
        at = selection.get("offset", 0)
        for part in await read(writer, follow=False, **selection):
            first, at = at, part.last + 1 if isinstance(part, Gap) else part.next_offset
            assert first == (part.first if isinstance(part, Gap) else part.offset) and first < at
        assert at == writer.offset or last, "the last record alone says where a log ends"
        assert at >= writer.offset
    for streams in (frozenset(Stream), frozenset({Stream.STDERR})):
        await read(writer, tail=400, streams=streams)
        assert all(part.first <= part.last for part in await read(writer, streams=streams) if isinstance(part, Gap))


async def test_what_damage_at_the_end_of_a_segment_takes_is_that_segment_s(tmp_path: Path) -> None:
    """Nothing of the next one, and it is told as lost: retention had no part in it. Of a shim whose records have no checksum."""
    writer = LogWriter(tmp_path / "log", checked=False)
    writer.write("stdout", b"first\n")
    writer.write("stdout", b"damaged\n")
    writer.index.write_bytes(writer.index.read_bytes()[: RECORD.size] + b"\7" * RECORD.size)
    writer.new_segment()
    writer.write("stderr", b"next\n")
    parts = await read(writer, follow=False)
    assert [part if isinstance(part, Gap) else part.data for part in parts] == [b"first\n", Gap(6, 13, "lost"), b"next\n"]


async def test_damage_before_lost_writes_is_told_as_damage(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log")
    writer.write("stdout", b"first\n")
    writer.write("stdout", b"damaged\n")
    writer.index.write_bytes(writer.index.read_bytes()[: RECORD.size] + b"\7" * RECORD.size)
    writer.lose(10)
    writer.write("stdout", b"next\n")
    gaps = [part for part in await read(writer, follow=False) if isinstance(part, Gap)]
    assert gaps == [Gap(6, 13, "lost"), Gap(14, 23, "write_error")]


def drop(writer: LogWriter, *bases: int) -> None:
    """As retention does: the index first."""
    for base in bases:
        (writer.directory / f"{base:016x}.idx").unlink()
        (writer.directory / f"{base:016x}").unlink()


async def test_a_slow_follower_has_the_rest_of_the_segment_that_is_dropped_under_it(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=30), Owner()
    for number in range(9):
        writer.write("stderr" if number % 3 == 1 else "stdout", b"%d" % number * 10)
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection()) as slow, log.reader(Selection(streams=frozenset({Stream.STDERR}))) as filtered:
            assert [await anext(slow), await anext(filtered)] == [part_at(writer, 0), part_at(writer, 10)]
            drop(writer, 0, 30)
            writer.end()
            owner.end()
            assert [part async for part in slow] == [
                part_at(writer, 10),
                part_at(writer, 20),
                Gap(30, 59, "dropped"),
                *(part_at(writer, at) for at in (60, 70, 80)),
            ]
            assert [part async for part in filtered] == [Gap(30, 59, "dropped"), part_at(writer, 70)]


def part_at(writer: LogWriter, offset: int) -> Chunk:
    """Of writes of ten bytes and a millisecond each, each third from the second on to stderr."""
    number = offset // 10
    begun = writer.clock - 9 * MS
    stream = Stream.STDERR if number % 3 == 1 else Stream.STDOUT
    return Chunk(stream, b"%d" % number * 10, offset, (begun + (number + 1) * MS) // 1000 / 1_000_000)


async def test_a_follower_at_a_border_whose_next_segment_is_dropped_goes_on_or_is_told_it(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=10), Owner()
    writer.write("stdout", b"0123456789")
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection()) as at_the_border, log.reader(Selection(offset=10)) as begun_there:
            await anext(at_the_border)
            waiting = [asyncio.ensure_future(anext(reader)) for reader in (at_the_border, begun_there)]
            await asyncio.sleep(0)
            for data in (b"abcdefghij", b"klmnopqrst", b"end"):
                writer.write("stdout", data)
            drop(writer, 0, 10, 20)
            with fail_after(5):
                for reader, first in zip((at_the_border, begun_there), waiting, strict=True):
                    await check_rest(reader, await first, b"abcdefghijklmnopqrstend", 10)


async def check_rest(reader: OutputReader, part: Chunk | Gap, written: bytes, begun: int) -> None:
    """From this part on each byte is given as it was written, or told as dropped: it goes by what the reader's thread had open."""
    at, end = begun, begun + len(written)
    while True:
        if isinstance(part, Gap):
            assert (part.first, part.reason) == (at, "dropped")
            at = part.last + 1
        else:
            assert part.data and (part.offset, part.data) == (at, written[at - begun :][: len(part.data)])
            at += len(part.data)
        if at >= end:
            break
        part = await anext(reader)
    assert at == end


@pytest.mark.parametrize("streams", [frozenset(Stream), frozenset({Stream.STDERR})], ids=["both", "stderr"])
async def test_a_stream_without_a_byte_is_one_end(tmp_path: Path, streams: frozenset[Stream]) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    if len(streams) == 1:
        writer.write("stdout", b"of the other\n")
    with open_log(writer.directory, owner) as log:
        for selection in (Selection(streams=streams), Selection(streams=streams, tail=5), Selection(streams=streams, since=1.0)):
            following = asyncio.ensure_future(lines_of(reader := log.reader(selection)))
            await asyncio.sleep(0.01)
            assert not following.done()
            following.cancel()
            await asyncio.wait([following])
        writer.end()
        owner.end()
        for selection in (Selection(streams=streams), Selection(streams=streams, tail=5), Selection(streams=streams, since=1.0)):
            assert await lines_of(reader := log.reader(selection)) == []
            assert reader.end is not None and reader.end.total_bytes == writer.offset


async def test_times_are_exact_to_the_microsecond_at_both_ends(tmp_path: Path) -> None:
    """A record's nanoseconds count; what is asked for are microseconds: from the first of one on, and up to before it."""
    writer = LogWriter(tmp_path / "log")
    begun = writer.clock
    for name, at in ((b"a", 999), (b"b", 1000), (b"c", 1001), (b"d", 1999), (b"e", 2000)):
        writer.clock = begun + at
        writer.write("stdout", name, 0)
    writer.end()
    micros = {number: begun / 1e9 + number / 1e6 for number in (1, 2)}
    assert text(await read(writer, since=micros[1])) == b"bcde"
    assert text(await read(writer, since=micros[2])) == b"e"
    assert text(await read(writer, until=micros[1])) == b"a"
    assert text(await read(writer, until=micros[2])) == b"abcd"
    assert text(await read(writer, since=micros[1], until=micros[2])) == b"bcd"
    assert text(await read(writer, since=micros[1], until=micros[1])) == b""
