"""The walk through the files of a log: an offset and an open segment, and from there the next part. No waiting, no job.

position ──► next record of the index ──► bytes of the segment ──► Chunk
                │ none
                ├─ a later segment is there: go on in it, a Gap if it does not begin where this one ends
                └─ otherwise: NOTHING more for now, or END

Everything here may be asked with `nowait`, and raises BlockingIOError where it would read the disk: ask again in a thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path

from jobrunner.errors import HostError, JobNotFound
from jobrunner.job import Gap
from jobrunner.log import position
from jobrunner.log.chunks import BLOCK, MERGE_NS, ChunkCache, cut_chunk
from jobrunner.log.segments import DAMAGED, DATA, END, GAP, STREAMS, Record, Segment, list_segments
from jobrunner.output import Begin, Chunk, Selection

__all__ = ["Cursor", "Step"]

PASSES = 256
"""Records that are passed over at once: less than a millisecond. Of one stream of a log of both there may be millions."""


class Step(enum.Enum):
    """What there is instead of a part."""

    NOTHING = enum.auto()
    """Caught up."""
    MOVED = enum.auto()
    """Something was passed over; look again, after others have had their turn."""
    END = enum.auto()
    UNTIL = enum.auto()
    """What comes now is not wanted any more."""


class Cursor:
    """Where one reader is in its log. One call at a time, on any thread."""

    def __init__(self, job_id: str, directory: Path, cache: ChunkCache, selection: Selection) -> None:
        self.offset = selection.offset
        """Of the next byte that was not given."""
        self.begin: Begin | None = None
        """Set by `locate`."""
        self.since = position.nanoseconds(selection.since)
        """None once a record of this time or later was met."""
        self.until = position.nanoseconds(selection.until)
        self.block = BLOCK
        """Where chunks end at the latest: BLOCK or LARGE."""
        self.stop: int | None = None
        """No chunk that begins here or later is wanted."""
        self._job_id = job_id
        self._directory = directory
        self._cache = cache
        self._selection = selection
        self.hole = False
        """Whether damaged records were passed over, and nothing has told yet what they covered."""
        self._segment: Segment | None = None
        self._number = 0

    @property
    def must_search(self) -> bool:
        """Whether finding the beginning may take a while."""
        return self._selection.tail is not None or self.since is not None

    @property
    def in_segment(self) -> bool:
        """Whether the place of the offset has been found."""
        return self._segment is not None

    def locate(self, cancelled: Callable[[], bool]) -> Begin:
        """Find where to begin; before anything else. `cancelled` as `position.begin` has it. Raises as `advance` does."""
        begin = Begin(self.offset, self.offset, self.offset)
        if self.must_search:
            try:
                begin = position.begin(self._directory, self._selection, cancelled)
            except OSError as exc:
                raise self._told(exc) from exc
        self.begin, self.offset = begin, begin.offset
        return begin

    def advance(self, nowait: bool) -> Chunk | Gap | Step:
        """The next part. JobNotFound if the log has been removed; HostError if it cannot be read."""
        try:
            for _ in range(PASSES):
                part = self._read(self._segment, nowait) if self._segment else self._open(nowait)
                if part is not Step.MOVED:
                    return part
        except BlockingIOError:
            raise
        except OSError as exc:
            raise self._told(exc) from exc
        return Step.MOVED

    def _told(self, exc: OSError) -> JobNotFound | HostError:
        if isinstance(exc, FileNotFoundError):  # removed under this reader
            return JobNotFound(self._job_id)
        return HostError(f"cannot read log of job {self._job_id}: {exc.strerror}")

    def close(self) -> None:
        """Close the open segment; may be called twice."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _open(self, nowait: bool) -> Gap | Step:
        """Open the segment that holds the offset, or else the first after it."""
        if nowait:
            raise BlockingIOError
        bases = list_segments(self._directory)
        if not bases:
            return Step.NOTHING
        segment = self._try_open(max((base for base in bases if base <= self.offset), default=bases[0]))
        if segment is None:
            return Step.MOVED
        if self.offset < segment.base:
            return self._enter(segment)
        number = segment.find(self.offset, nowait)
        last = segment.record(number - 1, nowait) if number else None
        covered = last.end if last else segment.base
        if last is not None and last.kind == END and last.end == self.offset:
            number -= 1
        elif number == segment.records() and covered < self.offset and segment.base == bases[-1]:
            segment.close()  # past what is there so far
            return Step.NOTHING
        self._segment, self._number = segment, number
        return Step.MOVED

    def _try_open(self, base: int) -> Segment | None:
        try:
            return Segment(self._directory, base)
        except FileNotFoundError:  # retention took it after it was listed: list again
            return None

    def _enter(self, segment: Segment) -> Gap | Step:
        """Go on at the start of this segment, and tell what is missing before it."""
        first, self.offset = self.offset, max(self.offset, segment.base)
        self.close()
        self._segment, self._number = segment, 0
        record = segment.record(0, nowait=False) if first < segment.base else None
        if record is not None and record.kind == DAMAGED:
            record = None
        if first >= segment.base or (record is not None and self._is_too_early(record)):
            return Step.MOVED
        if record is None or record.kind != GAP:
            self.since = None  # what was told as missing may be of that time, and so is all after it
            return Gap(first, segment.base - 1, self._untold())
        if first < record.end - record.lost:
            # Bytes are missing before those that the record tells: those first, these when we come again.
            self.offset = record.end - record.lost
            self.close()
            return Gap(first, self.offset - 1, self._untold())
        return Gap(first, segment.base - 1, record.gap_reason)

    def _untold(self) -> str:
        """Why bytes are missing before a segment that does not tell of them."""
        return "lost" if self.hole else "dropped"

    def _is_too_early(self, record: Record) -> bool:
        """Whether this is before `since`; no later record is asked once one was not."""
        if self.since is not None and record.time_ns >= self.since:
            self.since = None
        return self.since is not None

    def _read(self, segment: Segment, nowait: bool) -> Chunk | Gap | Step:
        record = segment.record(self._number, nowait)
        if record is None:
            return self._leave(segment, nowait)
        if record.kind == END:
            return self._lost_before(record) or Step.END
        if self.stop is not None and self.offset >= self.stop:
            return Step.UNTIL
        if record.kind == DAMAGED:
            self.hole, self._number = True, self._number + 1
            return Step.MOVED
        first, start = self.offset, self._start(record)
        self.hole = False
        if start > first and not self._is_too_early(record):
            self.offset = start
            return Gap(first, start - 1, "lost")
        if self.until is not None and record.kind == DATA and record.time_ns >= self.until:
            return Step.UNTIL
        if not self._is_wanted(record):
            self.offset, self._number = max(self.offset, record.end), self._number + 1
            return Step.MOVED
        if self.begin is not None:
            self.offset = max(self.offset, self.begin.of(STREAMS[record.stream]))
        chunk, number = self._cached(segment, record, nowait)
        if not chunk.data:
            return self._miss(segment, record)
        self.offset, self._number = chunk.next_offset, number
        return chunk

    def _lost_before(self, end: Record) -> Gap | None:
        """What damaged records covered that are the last before the end."""
        first = self.offset
        if not self.hole or not end.lost or end.end <= first:
            return None
        self.offset = end.end
        return Gap(first, end.end - 1, "lost")

    def _start(self, record: Record) -> int:
        """Where a record's bytes begin. One that does not say takes up those before it, unless these were nobody's: but no segment
        begins with those.
        """
        if record.size is not None:
            return record.end - record.size
        return record.end if self.hole and self._number else min(self.offset, record.end)

    def _is_wanted(self, record: Record) -> bool:
        if record.kind != DATA or STREAMS[record.stream] not in self._selection.streams or self._is_too_early(record):
            return False
        stream = STREAMS[record.stream]
        # Not after the offset: a reader ahead of the live end, that was overtaken while it looked for its place.
        return record.end > max(self.offset, self.begin.of(stream) if self.begin else 0)

    def _cached(self, segment: Segment, record: Record, nowait: bool) -> tuple[Chunk, int]:
        job_id, block, exact = self._job_id, self.block, self._selection.exact_times
        shared = self.until is None or record.time_ns + MERGE_NS < self.until  # another reader's chunk may reach past the time
        entry = self._cache.get(job_id, self.offset, block, exact) if shared else None
        if entry is None:
            entry = cut_chunk(segment, self._number, self.offset, block=block, exact=exact, until=self.until, nowait=nowait)
            if shared and entry[0].data:
                self._cache.put(job_id, *entry, block, exact)
        return entry

    def _miss(self, segment: Segment, record: Record) -> Gap | Step:
        """The index covers what is not there: the host crashed before the bytes were on disk, and after the index was.

        Or it is damaged, and says too much: not more is believed than what comes after it leaves room for.
        """
        first, self._number = self.offset, self._number + 1
        later = [base for base in list_segments(self._directory) if base > segment.base]
        if later and later[0] <= first:
            return Step.MOVED
        following = segment.record(self._number, nowait=False)
        ends = [record.end, *([following.end] if following else []), *later]
        self.offset = min(end for end in ends if end > first)
        return Gap(first, self.offset - 1, "lost")

    def _leave(self, segment: Segment, nowait: bool) -> Gap | Step:
        """No further record here: go on in the segment after this one, if there is one."""
        later = [base for base in list_segments(self._directory) if base > segment.base]
        if not later:
            return Step.NOTHING
        if nowait:
            raise BlockingIOError
        # Order: the shim writes no record to a segment after it has made the next; one written before that is found now.
        if segment.record(self._number, nowait) is not None:
            return Step.MOVED
        following = self._try_open(later[0])
        if following is None:
            return Step.MOVED
        if following.base > self.offset and not following.records():
            if len(later) == 1:
                following.close()  # its first record will tell why bytes are missing
                return Step.NOTHING
            self.hole = True  # there is a next one, so it has lost that record
        return self._enter(following)
