"""One subscriber of one log: an offset, an open segment, and no queue. Late and live readers run the same lines.

position ──► next record of the index ──► bytes of the segment ──► Chunk
                │ none
                ├─ a later segment is there: go on in it, a Gap if it does not begin where this one ends
                ├─ END, or the job has ended and nothing was added since: the end
                └─ otherwise: caught up; wait for inotify
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Protocol

from jobrunner.errors import JobNotFound, OffsetOutOfRange, WouldBlock
from jobrunner.job import Gap, JobInfo, Stream
from jobrunner.log.segments import (
    BLOCK,
    DATA,
    END,
    GAP,
    STREAMS,
    ChunkCache,
    Record,
    Segment,
    last_end,
    list_segments,
)
from jobrunner.output import Chunk, End, OutputReader

MERGE_RECORDS = 128
MERGE_NS = 50_000_000
"""Records of one stream are given as one chunk while they are within 50 ms, so that a chunk's time is true to that."""


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

    def reader(self, offset: int, follow: bool, streams: Collection[Stream]) -> LogReader:
        return LogReader(self, offset, follow, frozenset(streams))

    def changed(self) -> Awaitable[object]:
        return self._changed(str(self.directory))


class _Step(enum.Enum):
    NOTHING = enum.auto()
    """Caught up."""
    MOVED = enum.auto()
    """Something was passed over; look again."""
    END = enum.auto()


class LogReader(OutputReader):
    """One subscriber; see the module."""

    def __init__(self, log: Log, offset: int, follow: bool, streams: frozenset[Stream]) -> None:
        super().__init__()
        self.offset = offset
        """Of the next byte that this reader has not given."""
        self._log = log
        self._follow = follow
        self._streams = streams or frozenset(Stream)
        self._segment: Segment | None = None
        self._number = 0
        self._thread: asyncio.Future[Chunk | Gap | _Step] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<LogReader {self._log.owner.job_id} at {self.offset}>"

    async def __anext__(self) -> Chunk | Gap:
        watch: Awaitable[object] | None = None
        while self.end is None and not self._closed:
            # Order: whether the job has ended is asked before the read, so that nothing written before its end is missed.
            ended = self._log.owner.ended
            part = await self._advance()
            if isinstance(part, Chunk | Gap):
                return part
            if part is _Step.END or ended or not self._follow:
                await self._finish(part)
            elif watch is None:
                watch = self._log.changed()  # Order: watch first, then read again; what comes between is seen by one of the two
            else:
                await watch
                watch = None
        raise StopAsyncIteration

    def next_nowait(self) -> Chunk | Gap | None:
        if self.end is not None or self._closed:
            return None
        if self._thread is not None:
            raise WouldBlock  # a wait that was cancelled left its read under way: `__anext__` takes it up
        ended = self._log.owner.ended
        part = self._advance_now(nowait=False)
        if isinstance(part, Chunk | Gap):
            return part
        if not ended and self._follow:
            raise WouldBlock
        self._check_range(part, ended)
        self.end = End(self.offset, self._log.owner.info())
        return None

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

    async def _finish(self, part: _Step) -> None:
        owner = self._log.owner
        info = await owner.wait() if self._follow else owner.info()
        self._check_range(part, owner.ended)
        self.end = End(self.offset, info)
        self._release()

    def _check_range(self, part: object, ended: bool) -> None:
        if self._segment is None and part is _Step.NOTHING and ended and self.offset:
            end = self._log.bounds()[1]
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
        if first == segment.base:
            return _Step.MOVED
        record = segment.record(0, nowait=False)
        return Gap(first, segment.base - 1, "write_error" if record and record.kind == GAP else "dropped")

    def _read(self, segment: Segment, nowait: bool) -> Chunk | Gap | _Step:
        record = segment.record(self._number, nowait)
        if record is None:
            return self._leave(segment, nowait)
        if record.kind == END:
            return _Step.END
        if record.kind != DATA or STREAMS[record.stream] not in self._streams or record.end <= self.offset:
            # The last: a reader ahead of the live end, that was overtaken while it looked for its place.
            self.offset, self._number = max(self.offset, record.end), self._number + 1
            return _Step.MOVED
        entry = self._log.cache.get(self._log.owner.job_id, self.offset)
        if entry is None:
            entry = self._assemble(segment, record, nowait)
            if not entry[0].data:
                return self._miss(record)
            self._log.cache.put(self._log.owner.job_id, *entry)
        chunk, self._number = entry
        self.offset = chunk.next_offset
        return chunk

    def _miss(self, record: Record) -> Gap:
        """The index covers what is not there: the host crashed before the bytes were on disk, and after the index was."""
        first, self.offset = self.offset, record.end
        self._number += 1
        return Gap(first, record.end - 1, "lost")

    def _assemble(self, segment: Segment, first: Record, nowait: bool) -> tuple[Chunk, int]:
        """The chunk at the offset, and the number of the record that the byte after it is in."""
        border = (self.offset // BLOCK + 1) * BLOCK
        number, last = self._number, first
        while last.end < border and number - self._number < MERGE_RECORDS:
            record = segment.record(number + 1, nowait)
            if record is None or (record.kind, record.stream) != (DATA, first.stream) or record.time_ns - first.time_ns > MERGE_NS:
                break
            number, last = number + 1, record
        stop = min(last.end, border)
        data = segment.data(self.offset, stop - self.offset, nowait)
        chunk = Chunk(STREAMS[first.stream], data, self.offset, first.time_ns / 1e9)
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
