"""One subscriber of one log: an offset, an open segment, and no queue. Late and live readers run the same lines.

position ──► next record of the index ──► bytes of the segment ──► Chunk
                │ none
                ├─ a later segment is there: go on in it, a Gap if it does not begin where this one ends
                ├─ END, or the job has ended and nothing was added since: the end
                └─ otherwise: caught up; wait for inotify, or for `until`

Where the first position is, `position` finds.
"""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import anyio

from jobrunner.errors import JobNotFound, OffsetOutOfRange, WouldBlock
from jobrunner.job import Gap, JobInfo
from jobrunner.log import position
from jobrunner.log.segments import (
    BLOCK,
    DATA,
    END,
    GAP,
    GAP_REASONS,
    STREAMS,
    ChunkCache,
    Record,
    Segment,
    last_end,
    list_segments,
)
from jobrunner.output import Begin, Chunk, End, OutputReader, Selection

MERGE_RECORDS = 128
MERGE_NS = 50_000_000
"""Records of one stream are given as one chunk while they are within 50 ms, so that a chunk's time is true to that."""
LATE = 0.25
"""Seconds after `until` at which what was read before it has been written: a shim may be held back by its job's CPU limit."""


class LogOwner(Protocol):
    """The job that a log belongs to, as the log needs it."""

    job_id: str

    @property
    def ended(self) -> bool: ...

    def info(self) -> JobInfo: ...

    async def wait(self) -> JobInfo: ...


class Log:
    """What the readers of one job share: its directory, the cache, and the way to hear that something was written."""

    def __init__(self, owner: LogOwner, directory: Path, cache: ChunkCache, changed: Callable[[str], Awaitable[object]]) -> None:
        """`changed(directory)` arms a watch at once and gives an awaitable that is done when anything in it has changed."""
        self.owner = owner
        self.directory = directory
        self.cache = cache
        self._changed = changed

    def __repr__(self) -> str:
        return f"<Log {self.owner.job_id}>"

    def bounds(self) -> tuple[int, int]:
        """(first offset that is still there, offset after the last byte)."""
        try:
            return last_end(self.directory)
        except FileNotFoundError:  # removed, or a segment that retention took between listing and opening it
            return (0, 0)

    def reader(self, selection: Selection) -> LogReader:
        return LogReader(self, selection)

    def changed(self) -> Awaitable[object]:
        return self._changed(str(self.directory))


class _Step(enum.Enum):
    NOTHING = enum.auto()
    """Caught up."""
    MOVED = enum.auto()
    """Something was passed over; look again."""
    END = enum.auto()
    UNTIL = enum.auto()
    """What comes now is not wanted any more."""


class LogReader(OutputReader):
    """One subscriber; see the module."""

    def __init__(self, log: Log, selection: Selection) -> None:
        super().__init__()
        self.offset = selection.offset
        """Of the next byte that this reader has not given."""
        self._log = log
        self._selection = selection
        self._begin: Begin | None = None
        self._since = position.nanoseconds(selection.since)
        """None once a record of this time or later was met."""
        self._until = position.nanoseconds(selection.until)
        self._segment: Segment | None = None
        self._number = 0
        self._locating: asyncio.Future[Begin] | None = None
        self._thread: asyncio.Future[Chunk | Gap | _Step] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<LogReader {self._log.owner.job_id} at {self.offset}>"

    async def locate(self) -> Begin:
        """Find where to begin. The first read does it otherwise; for `tail` what is there at this moment counts."""
        if self._begin is None and not self._must_search():
            self._locate_now()
        while self._begin is None:
            if self._locating is None:
                self._locating = asyncio.get_running_loop().run_in_executor(None, self._locate_now)
            await asyncio.wait((self._locating,))  # a wait that is cancelled leaves it to the next one
            self._locating.result()
        return self._begin

    def _must_search(self) -> bool:
        return self._selection.tail is not None or self._since is not None

    def _locate_now(self) -> Begin:
        begin = Begin(self.offset, self.offset, self.offset)
        if self._must_search():
            begin = position.begin(self._log.directory, self._selection, lambda: self._closed)
        self._begin, self.offset = begin, begin.offset
        return begin

    async def __anext__(self) -> Chunk | Gap:
        await self.locate()
        watch: Awaitable[object] | None = None
        while self.end is None and not self._closed:
            # Order: whether the job has ended, or the time has come, is asked before the read, so that nothing before it is missed.
            ended, passed = self._log.owner.ended, self._until_in() <= 0
            part = await self._advance()
            if part is _Step.NOTHING and ended and not passed:
                part = self._missing_end()
            if isinstance(part, Chunk | Gap):
                return part
            if part is not _Step.NOTHING or ended or passed or not self._selection.follow:
                await self._finish(part, passed)
            elif watch is None:
                watch = self._log.changed()  # Order: watch first, then read again; what comes between is seen by one of the two
            else:
                with anyio.move_on_after(max(0, self._until_in())):
                    await watch
                watch = None
        raise StopAsyncIteration

    def next_nowait(self) -> Chunk | Gap | None:
        if self.end is not None or self._closed:
            return None
        if self._thread is not None or (self._locating is not None and self._begin is None):
            raise WouldBlock  # a wait that was cancelled left its read under way: `__anext__` takes it up
        if self._begin is None:
            self._locate_now()
        ended, passed = self._log.owner.ended, self._until_in() <= 0
        part = self._advance_now(nowait=False)
        if part is _Step.NOTHING and ended and not passed:
            part = self._missing_end()
        if isinstance(part, Chunk | Gap):
            return part
        if part is _Step.NOTHING and not ended and not passed and self._selection.follow:
            raise WouldBlock
        self._check_range(part, ended)
        self.end = End(self.offset, self._log.owner.info())
        return None

    def _until_in(self) -> float:
        """Seconds until nothing that is wanted can come any more."""
        return math.inf if self._until is None else self._until / 1e9 + LATE - time.time()

    def _missing_end(self) -> Gap | _Step:
        """A log that ends before its job's last byte: the disk was full to the very end, and no record of that found a place."""
        first, total = self.offset, self._log.owner.info().log_end
        if first >= total or self._since is not None:
            return _Step.NOTHING
        self.offset = total
        return Gap(first, total - 1, GAP_REASONS[0])

    async def aclose(self) -> None:
        self._closed = True
        if self._thread is not None and not self._thread.done():
            # A cancelled reader's thread may still read: the files are closed after it, or it would read a stranger's.
            self._thread.add_done_callback(self._release_after)
        else:
            self._release()

    def _release_after(self, thread: asyncio.Future[Chunk | Gap | _Step]) -> None:
        if not thread.cancelled():
            thread.exception()  # nobody waits for it any more
        self._release()

    def _release(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    async def _finish(self, part: _Step, passed: bool) -> None:
        owner = self._log.owner
        follow = self._selection.follow and part is not _Step.UNTIL and not passed
        info = await owner.wait() if follow else owner.info()
        self._check_range(part, owner.ended)
        self.end = End(self.offset, info)
        self._release()

    def _check_range(self, part: object, ended: bool) -> None:
        if self._segment is None and part is _Step.NOTHING and ended and self.offset:
            end = max(self._log.bounds()[1], self._log.owner.info().log_end)
            if self.offset > end:
                raise OffsetOutOfRange(self._log.owner.job_id, self.offset, end)

    async def _advance(self) -> Chunk | Gap | _Step:
        """The next part, read on the loop if memory holds it and in a thread if not.

        A wait that is cancelled leaves the thread at its read. What it reads is the next part all the same, and nobody else may
        read meanwhile: the next call takes it up.
        """
        if self._thread is None:
            try:
                return self._advance_now(nowait=True)
            except BlockingIOError:
                self._thread = asyncio.get_running_loop().run_in_executor(None, self._advance_now, False)
        thread = self._thread
        await asyncio.wait((thread,))  # which, unlike awaiting it, does not cancel it
        self._thread = None
        return thread.result()

    def _advance_now(self, nowait: bool) -> Chunk | Gap | _Step:
        part: Chunk | Gap | _Step = _Step.MOVED
        try:
            while part is _Step.MOVED:
                part = self._read(self._segment, nowait) if self._segment else self._open(nowait)
        except FileNotFoundError as exc:
            raise JobNotFound(self._log.owner.job_id) from exc  # removed under this reader
        return part

    def _open(self, nowait: bool) -> Gap | _Step:
        """Open the segment that holds the offset, or else the first after it."""
        if nowait:
            raise BlockingIOError
        bases = list_segments(self._log.directory)
        if not bases:
            return _Step.NOTHING
        segment = self._try_open(max((base for base in bases if base <= self.offset), default=bases[0]))
        if segment is None:
            return _Step.MOVED
        if self.offset < segment.base:
            return self._enter(segment)
        number = segment.find(self.offset, nowait)
        last = segment.record(number - 1, nowait) if number else None
        covered = last.end if last else segment.base
        if last is not None and last.kind == END and last.end == self.offset:
            number -= 1
        elif number == segment.records() and covered < self.offset and segment.base == bases[-1]:
            segment.close()  # past what is there so far
            return _Step.NOTHING
        self._segment, self._number = segment, number
        return _Step.MOVED

    def _try_open(self, base: int) -> Segment | None:
        try:
            return Segment(self._log.directory, base)
        except FileNotFoundError:  # retention took it after it was listed: list again
            return None

    def _enter(self, segment: Segment) -> Gap | _Step:
        """Go on at the start of this segment, and tell what is missing before it."""
        first, self.offset = self.offset, segment.base
        self._release()
        self._segment, self._number = segment, 0
        record = segment.record(0, nowait=False) if first < segment.base else None
        if first == segment.base or (record is not None and self._is_too_early(record)):
            return _Step.MOVED
        if record is None or record.kind != GAP:
            return Gap(first, segment.base - 1, "dropped")
        if first < record.end - record.lost:
            # Segments were dropped that stood before the bytes that the record tells: those first, these when we come again.
            self.offset = record.end - record.lost
            self._release()
            return Gap(first, self.offset - 1, "dropped")
        return Gap(first, segment.base - 1, record.gap_reason)

    def _is_too_early(self, record: Record) -> bool:
        """Whether this is before `since`; no later record is asked once one was not."""
        if self._since is not None and record.time_ns >= self._since:
            self._since = None
        return self._since is not None

    def _read(self, segment: Segment, nowait: bool) -> Chunk | Gap | _Step:
        record = segment.record(self._number, nowait)
        if record is None:
            return self._leave(segment, nowait)
        if record.kind == END:
            return _Step.END
        if self._until is not None and record.kind == DATA and record.time_ns >= self._until:
            return _Step.UNTIL
        if not self._is_wanted(record):
            self.offset, self._number = max(self.offset, record.end), self._number + 1
            return _Step.MOVED
        if self._begin is not None:
            self.offset = max(self.offset, self._begin.of(STREAMS[record.stream]))
        chunk, number = self._cached(segment, record, nowait)
        if not chunk.data:
            return self._miss(record)
        self.offset, self._number = chunk.next_offset, number
        return chunk

    def _is_wanted(self, record: Record) -> bool:
        stream = STREAMS.get(record.stream)
        if record.kind != DATA or stream not in self._selection.streams or self._is_too_early(record):
            return False
        # Not after the offset: a reader ahead of the live end, that was overtaken while it looked for its place.
        return record.end > max(self.offset, self._begin.of(stream) if self._begin else 0)

    def _cached(self, segment: Segment, record: Record, nowait: bool) -> tuple[Chunk, int]:
        job_id, exact = self._log.owner.job_id, self._selection.exact_times
        if self._until is not None and record.time_ns + MERGE_NS >= self._until:
            return self._assemble(segment, record, nowait)  # another reader's chunk may reach past the time
        entry = self._log.cache.get(job_id, self.offset, exact)
        if entry is None:
            entry = self._assemble(segment, record, nowait)
            if entry[0].data:
                self._log.cache.put(job_id, *entry, exact)
        return entry

    def _miss(self, record: Record) -> Gap:
        """The index covers what is not there: the host crashed before the bytes were on disk, and after the index was."""
        first, self.offset = self.offset, record.end
        self._number += 1
        return Gap(first, record.end - 1, "lost")

    def _assemble(self, segment: Segment, first: Record, nowait: bool) -> tuple[Chunk, int]:
        """The chunk at the offset, and the number of the record that the byte after it is in."""
        border = (self.offset // BLOCK + 1) * BLOCK
        number, last = self._number, first
        most = 1 if self._selection.exact_times else MERGE_RECORDS
        before = min(first.time_ns + MERGE_NS + 1, math.inf if self._until is None else self._until)
        while last.end < border and number + 1 - self._number < most:
            record = segment.record(number + 1, nowait)
            if record is None or (record.kind, record.stream) != (DATA, first.stream) or record.time_ns >= before:
                break
            number, last = number + 1, record
        stop = min(last.end, border)
        data = segment.data(self.offset, stop - self.offset, nowait)
        # Rounded down, so that a time that was told is not after the record it was told of: as `since` it gives that record again.
        chunk = Chunk(STREAMS[first.stream], data, self.offset, first.time_ns // 1000 / 1_000_000)
        if len(data) < stop - self.offset:  # after a crash of the host: what is there, and `_miss` for the rest
            number = segment.find(chunk.next_offset, nowait)
        elif last.end <= border:
            number += 1
        return chunk, number

    def _leave(self, segment: Segment, nowait: bool) -> Gap | _Step:
        """No further record here: go on in the segment after this one, if there is one."""
        later = [base for base in list_segments(self._log.directory) if base > segment.base]
        if not later:
            return _Step.NOTHING
        if nowait:
            raise BlockingIOError
        # Order: the shim writes no record to a segment after it has made the next; one written before that is found now.
        if segment.record(self._number, nowait) is not None:
            return _Step.MOVED
        following = self._try_open(later[0])
        if following is None:
            return _Step.MOVED
        if following.base > self.offset and not following.records():
            following.close()  # its first record will tell why bytes are missing
            return _Step.NOTHING
        return self._enter(following)
