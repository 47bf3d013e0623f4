"""Where in a log to begin: for the last lines, and for a time.

Nothing but the index and the data tell it, so both are read backwards, a page of records and a block of bytes at a time; what is
held is one of each and a few numbers. All of this may reach the disk: call it in a thread.

Lines are ordered by their last bytes. A stream's last byte ends a line whether or not it is a newline, and so does the last byte
before a gap. The last N lines of two streams begin at two places, so a reader is given one for each (`output.Begin`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from jobrunner.job import Stream
from jobrunner.log.segments import DAMAGED, DATA, STREAMS, Segment, last_end, list_segments
from jobrunner.output import Begin, Selection

__all__ = ["begin", "nanoseconds"]

SCAN = 65536
"""Bytes of data read at once."""


def nanoseconds(seconds: float | None) -> int | None:
    """A time as the index has it; exact to the microsecond, as the protocol is."""
    return None if seconds is None else round(seconds * 1_000_000) * 1000


def begin(directory: Path, selection: Selection, cancelled: Callable[[], bool]) -> Begin:
    """Where a reader begins. `cancelled` is asked now and then: what is given after it said yes is of no use.

    Raises FileNotFoundError if the log's directory is gone.
    """
    floor = selection.offset
    since, until = nanoseconds(selection.since), nanoseconds(selection.until)
    if since is not None:
        floor = max(floor, _at_time(directory, since))
    if selection.tail is None:
        return Begin(floor, floor, floor)
    end = last_end(directory)[1]
    if until is not None:
        end = min(end, _at_time(directory, until))
    scan = _Tail(selection.tail, selection.streams, floor, max(floor, end))
    for stream, offset, data in _pieces(directory, floor, end, scan, cancelled):
        scan.take(stream, offset, data)
        if scan.found:
            break
    return scan.begin()


def _at_time(directory: Path, time_ns: int) -> int:
    """The offset of the first byte of this time or later, the log's end if there is none.

    What is missing just before it may be of that time too: then the offset is that of the first missing byte.
    """
    reached: int | None = None
    for base in reversed(list_segments(directory)):
        try:
            segment = Segment(directory, base)
        except FileNotFoundError:  # retention took it after it was listed, and all before it
            break
        with closing(segment):
            count = segment.records()
            number = segment.find_time(time_ns)
            if number < count:
                reached = _end_of(segment, number)
            if number:
                return _end_of(segment, number)
    return last_end(directory)[1] if reached is None else 0


def _end_of(segment: Segment, count: int) -> int:
    """Where the first `count` records of a segment end."""
    record = segment.record(count - 1, nowait=False) if count else None
    return record.end if record else segment.base


class _Tail:
    """Counts lines from the end on. `found` once no earlier byte is needed."""

    def __init__(self, lines: int, streams: frozenset[Stream], floor: int, end: int) -> None:
        self.streams = streams
        self._left = lines
        self._floor = floor
        self._starts = dict.fromkeys(Stream, end)
        """Of each stream, the first byte seen of the lines that were counted."""
        self._open: set[Stream] = set()
        """Streams whose line last counted may begin before what was seen."""

    @property
    def found(self) -> bool:
        return not self._left and not self._open

    def take(self, stream: Stream, offset: int, data: bytes) -> None:
        """What the stream wrote before all that was taken of it until now."""
        at = len(data)
        while at:
            if stream not in self._open:
                if not self._left:
                    return
                self._left -= 1
                self._open.add(stream)
                at -= 1  # its last byte, newline or not
                self._starts[stream] = offset + at
            ends = data.count(b"\n", 0, at)
            if ends <= self._left:  # all of it is wanted: in one step, however many lines it is
                self._left -= ends
                self._starts[stream] = offset
                return
            newline = data.rfind(b"\n", 0, at)
            self._starts[stream] = min(self._starts[stream], offset + newline + 1)
            self._open.discard(stream)
            at = newline + 1

    def gap(self) -> None:
        """Bytes are missing before what was seen: no line goes on there."""
        self._open.clear()

    def begin(self) -> Begin:
        """Where to begin; if there are fewer lines, at the beginning, so that what is missing there is told."""
        if self._left:
            return Begin(self._floor, self._floor, self._floor)
        starts = self._starts
        return Begin(min(starts[stream] for stream in self.streams), starts[Stream.STDOUT], starts[Stream.STDERR])


def _pieces(
    directory: Path, floor: int, end: int, scan: _Tail, cancelled: Callable[[], bool]
) -> Iterator[tuple[Stream, int, bytes]]:
    """What there is of the streams from `end` back to `floor`: stream, offset, bytes. Gaps are told to `scan`."""
    at = end
    for base in reversed(list_segments(directory)):
        if base >= end:
            continue
        try:
            segment = Segment(directory, base)
        except FileNotFoundError:
            return
        with closing(segment):
            window = _Window(segment)
            for first, record in segment.backwards():
                if record.kind == DAMAGED:
                    continue
                if record.end < at:
                    scan.gap()
                at = min(at, first)
                if record.kind == DATA and STREAMS.get(record.stream) in scan.streams:
                    for offset, data in window.backwards(max(first, floor), min(record.end, end)):
                        yield STREAMS[record.stream], offset, data
                if at <= floor or cancelled():
                    return


class _Window:
    """The block of a segment's bytes that was read last: small records share a read."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._offset = 0
        self._data = b""
        self._end = segment.data_end()

    def backwards(self, first: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Bytes `first` to `stop` in pieces, the last one first: offset and bytes. A damaged index covers more."""
        first, stop = max(first, self._segment.base), min(stop, self._end)
        while stop > first:
            if not self._offset < stop <= self._offset + len(self._data):
                self._offset = max(self._segment.base, stop - SCAN)
                self._data = self._segment.data(self._offset, stop - self._offset, nowait=False)
            start = max(first, self._offset)
            yield start, self._data[start - self._offset : stop - self._offset]
            stop = start
