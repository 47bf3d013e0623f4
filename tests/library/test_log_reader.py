"""The reader against plain bytes: whatever was written, in whatever pieces, is what it gives, and what is not there is told."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobrunner import Gap, JobInfo, JobStatus, Stream, WouldBlock
from jobrunner.client.sequence import Sequence
from jobrunner.errors import JobNotFound, OffsetOutOfRange
from jobrunner.linux.inotify import Inotify
from jobrunner.log import ChunkCache, Log, LogReader
from jobrunner.log.chunks import BLOCK
from jobrunner.output import Begin, Chunk, Selection
from tests.support.logwriter import LogWriter


class Owner:
    """A job that runs until the test ends it."""

    def __init__(self) -> None:
        self.job_id = "0123456789ab"
        self.log_end = 0
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def end(self) -> None:
        self._ended.set()

    def info(self) -> JobInfo:
        return JobInfo(self.job_id, JobStatus.COMPLETED if self.ended else JobStatus.RUNNING, "test", log_end=self.log_end)

    async def wait(self) -> JobInfo:
        await self._ended.wait()
        return self.info()


@contextmanager
def open_log(directory: Path, owner: Owner) -> Iterator[Log]:
    with closing(Inotify()) as inotify:
        yield Log(owner, directory, ChunkCache(), inotify.changed)


async def collect(reader: LogReader) -> list[Chunk | Gap]:
    with anyio.fail_after(10):
        async with reader:
            return [part async for part in reader]


async def read_for_client(log: Log, selection: Selection) -> tuple[Begin, list[Chunk | Gap]]:
    """Where it begins, and all of it, as a client is sent it: which takes each part for what comes next."""
    sequence = Sequence(log.owner.job_id, selection)
    begin = await (reader := log.reader(selection)).locate()
    if selection.tail is not None or selection.since is not None:
        sequence.take(begin)
    parts = await collect(reader)
    assert reader.end is not None
    for part in (*parts, reader.end):
        sequence.take(part)
    return begin, parts


def text(parts: list[Chunk | Gap], stream: Stream | None = None) -> bytes:
    return b"".join(part.data for part in parts if isinstance(part, Chunk) and stream in (None, part.stream))


async def test_every_byte_in_order_across_segments(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=1000), Owner()
    for number in range(100):
        writer.write("stdout" if number % 3 else "stderr", b"%d\n" % number * 9)
    writer.end()
    owner.end()
    with open_log(writer.directory, owner) as log:
        parts = await collect(reader := log.reader(Selection()))
    assert text(parts) == b"".join(b"%d\n" % number * 9 for number in range(100))
    assert reader.end is not None and reader.end.total_bytes == writer.offset
    assert reader.end.info is not None and reader.end.info.status == "completed"


async def test_chunks_end_at_multiples_of_a_block_and_know_their_offset(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    data = bytes(range(256)) * 1000
    writer.write("stdout", data)
    writer.end()
    owner.end()
    with open_log(writer.directory, owner) as log:
        parts = await collect(log.reader(Selection()))
    assert [part.offset for part in parts if isinstance(part, Chunk)] == list(range(0, len(data), BLOCK))
    assert text(parts) == data


async def test_one_stream_only(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    writer.write("stdout", b"out1")
    writer.write("stderr", b"err")
    writer.write("stdout", b"out2")
    writer.end()
    owner.end()
    with open_log(writer.directory, owner) as log:
        assert text(await collect(log.reader(Selection(streams=frozenset({Stream.STDERR}))))) == b"err"
        assert text(await collect(log.reader(Selection(streams=frozenset({Stream.STDOUT}))))) == b"out1out2"


async def test_a_partial_record_and_data_past_the_index_are_not_there(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    writer.write("stdout", b"whole")
    writer.append(writer.data, b"not yet covered")
    writer.append(writer.index, b"\x20\0\0\0\0")
    with open_log(writer.directory, owner) as log:
        assert text(await collect(log.reader(Selection(follow=False)))) == b"whole"


async def test_a_missing_segment_is_a_gap_of_exactly_its_bytes(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=10), Owner()
    for _ in range(3):
        writer.write("stdout", b"0123456789")
    writer.end()
    owner.end()
    for name in ("000000000000000a", "000000000000000a.idx"):
        (writer.directory / name).unlink()
    with open_log(writer.directory, owner) as log:
        parts = await collect(log.reader(Selection(offset=5)))
    assert [part if isinstance(part, Gap) else part.data for part in parts] == [b"56789", Gap(10, 19, "dropped"), b"0123456789"]


async def test_a_reader_that_starts_before_the_first_segment_is_told_a_gap(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=10), Owner()
    writer.write("stdout", b"0123456789")
    writer.write("stdout", b"abc")
    writer.end()
    owner.end()
    for name in ("0000000000000000", "0000000000000000.idx"):
        (writer.directory / name).unlink()
    with open_log(writer.directory, owner) as log:
        parts = await collect(log.reader(Selection(offset=3)))
        assert log.bounds() == (10, 13)
    assert [part if isinstance(part, Gap) else part.data for part in parts] == [Gap(3, 9, "dropped"), b"abc"]


async def test_lost_writes_are_a_gap_with_their_reason(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    writer.write("stdout", b"before")
    writer.lose(7)
    writer.write("stdout", b"after")
    writer.end()
    owner.end()
    with open_log(writer.directory, owner) as log:
        parts = await collect(reader := log.reader(Selection()))
    assert [part if isinstance(part, Gap) else part.data for part in parts] == [b"before", Gap(6, 12, "write_error"), b"after"]
    assert reader.end is not None and reader.end.total_bytes == 18


async def test_dropped_bytes_before_lost_ones_are_a_gap_of_their_own(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=10), Owner()
    for _ in range(2):
        writer.write("stdout", b"0123456789")
    writer.lose(5)
    writer.write("stdout", b"after")
    writer.end()
    owner.end()
    for name in ("000000000000000a", "000000000000000a.idx"):
        (writer.directory / name).unlink()
    expected = [Gap(10, 19, "dropped"), Gap(20, 24, "write_error"), b"after"]
    with open_log(writer.directory, owner) as log:
        for offset, first in (
            (0, [b"0123456789", *expected]),
            (12, [Gap(12, 19, "dropped"), *expected[1:]]),
            (22, [Gap(22, 24, "write_error"), b"after"]),
        ):
            parts = await collect(log.reader(Selection(offset=offset)))
            assert [part if isinstance(part, Gap) else part.data for part in parts] == first


async def test_a_follower_gets_what_is_written_after_it_caught_up(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=8), Owner()
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection()) as reader:
            for number in range(20):  # with 8-byte segments the follower crosses many of them, live
                following = asyncio.create_task(anext(reader))
                await asyncio.sleep(0)
                writer.write("stdout", b"line %02d\n" % number)
                with anyio.fail_after(5):
                    part = await following
                assert isinstance(part, Chunk) and part.data == b"line %02d\n" % number
            writer.end()
            owner.end()
            with anyio.fail_after(5), pytest.raises(StopAsyncIteration):
                await anext(reader)


async def test_a_snapshot_ends_with_what_was_there_however_fast_its_job_writes(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=30), Owner()
    for number in range(10):
        writer.write("stdout", b"line %d\n" % number, after_ns=10**8)
    got = b""
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection(follow=False)) as reader:
            async for part in reader:
                assert isinstance(part, Chunk)
                got += part.data
                writer.write("stdout", b"more\n", after_ns=10**8)
    assert got == b"".join(b"line %d\n" % number for number in range(10))
    assert reader.end is not None and reader.end.info is not None and reader.end.info.status == "running"


async def test_a_log_without_an_end_record_ends_with_its_job(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    writer.write("stdout", b"last words")
    with closing(Inotify()) as inotify:
        log = Log(owner, writer.directory, ChunkCache(), inotify.changed)
        following = asyncio.create_task(collect(log.reader(Selection())))
        await asyncio.sleep(0.01)
        owner.end()
        inotify.wake(str(writer.directory))
        assert text(await following) == b"last words"


async def test_an_offset_past_the_end_of_an_ended_log_is_refused(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    writer.write("stdout", b"12345")
    writer.end()
    owner.end()
    with open_log(writer.directory, owner) as log:
        assert await collect(log.reader(Selection(offset=5))) == []
        with pytest.raises(OffsetOutOfRange, match="offset 6 is past its end, 5"):
            await collect(log.reader(Selection(offset=6)))


async def test_next_line_nowait_says_whether_to_come_again(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    with open_log(writer.directory, owner) as log:
        reader = log.reader(Selection())
        writer.write("stdout", b"one\ntw")
        first = reader.next_line_nowait()
        assert first is not None and first.data == b"one\n"
        with pytest.raises(WouldBlock):
            reader.next_line_nowait()
        writer.write("stdout", b"o")
        writer.end()
        owner.end()
        last = reader.next_line_nowait()
        assert last is not None and (last.data, last.offset) == (b"two", 4)
        assert reader.next_line_nowait() is None
        await reader.aclose()


async def test_waits_that_are_cancelled_lose_nothing(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=100), Owner()
    data = b"".join(b"%06d\n" % number for number in range(3000))
    for start in range(0, len(data), 70):
        writer.write("stdout", data[start : start + 70])
    writer.end()
    owner.end()
    got = b""
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection()) as reader:
            for attempt in range(100_000):
                waiting = asyncio.ensure_future(anext(reader))
                for _ in range(attempt % 3):
                    await asyncio.sleep(0)
                if attempt % 10:  # now and then to its end, so that it comes to one
                    waiting.cancel()
                try:
                    part = await waiting
                except asyncio.CancelledError:
                    continue
                except StopAsyncIteration:
                    break
                assert isinstance(part, Chunk)
                got += part.data
    assert got == data


async def test_a_reader_ahead_of_the_live_end_gets_nothing_before_its_offset(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    writer.write("stdout", b"x" * 500)
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection(offset=1000)) as reader:
            following = asyncio.ensure_future(anext(reader))
            for _ in range(6):
                writer.write("stdout", b"y" * 100)
                await asyncio.sleep(0.005)
            with anyio.fail_after(5):
                part = await following
    assert isinstance(part, Chunk)
    assert part.offset == 1000


async def test_an_index_that_is_ahead_of_its_data_is_told_as_a_gap(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log"), Owner()
    writer.write("stdout", b"0123456789")
    writer.write("stdout", b"abcdefghij")
    writer.end()
    owner.end()
    with writer.data.open("r+b") as file:
        file.truncate(13)  # as a power loss leaves it, if the index was on disk first
    with open_log(writer.directory, owner) as log:
        parts = await collect(log.reader(Selection()))
    assert text(parts) == b"0123456789abc"
    assert parts[-1] == Gap(13, 19, "lost")


async def test_a_log_that_is_removed_under_its_reader_is_not_found(tmp_path: Path) -> None:
    writer, owner = LogWriter(tmp_path / "log", segment_bytes=10), Owner()
    for _ in range(3):
        writer.write("stdout", b"0123456789")
    with open_log(writer.directory, owner) as log:
        async with log.reader(Selection()) as reader:
            await anext(reader)
            shutil.rmtree(writer.directory)
            with pytest.raises(JobNotFound):
                await anext(reader)


WRITES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(min_size=1, max_size=300), st.integers(0, 10**8)),
        st.tuples(st.just("lose"), st.integers(1, 50), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(writes=WRITES, start=st.integers(0, 2000), segment=st.integers(1, 500), only=st.sampled_from([None, *Stream]))
def test_model_any_log_read_from_any_offset_equals_the_bytes(
    writes: list[tuple[str, bytes | int, int]], start: int, segment: int, only: Stream | None
) -> None:
    model: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory() as directory:
        writer = LogWriter(Path(directory) / "log", segment)
        for kind, what, after in writes:
            if isinstance(what, int):
                writer.lose(what)
                model += [("lost", 0)] * what
            else:
                writer.write(kind, what, after)
                model += [(kind, byte) for byte in what]
        writer.end()
        start = min(start, len(model))
        parts = asyncio.run(_read_all(writer.directory, start, {only} if only else set(Stream)))
    seen: dict[int, tuple[str, int]] = {}
    for part in parts:
        if isinstance(part, Gap):
            seen |= dict.fromkeys(range(part.first, part.last + 1), ("lost", 0))
        else:
            seen |= {part.offset + index: (str(part.stream), byte) for index, byte in enumerate(part.data)}
    expected = {
        offset: byte for offset, byte in enumerate(model) if offset >= start and (only is None or byte[0] in (only, "lost"))
    }
    assert seen == expected
    assert list(seen) == sorted(seen)


async def _read_all(directory: Path, start: int, streams: set[Stream]) -> list[Chunk | Gap]:
    owner = Owner()
    owner.end()
    with open_log(directory, owner) as log:
        return await collect(log.reader(Selection(offset=start, streams=frozenset(streams))))
