"""The files of a log: where a segment begins, what its index covers, and bounded reads of both.

A read that could reach the disk is first tried with RWF_NOWAIT (preadv2(2)): the event loop reads what the page cache holds, and
whoever gets BlockingIOError does the same read again in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from jobrunner.job import Stream

RECORD = struct.Struct("<QqIIQ")
DAMAGED, DATA, GAP, END = 0, 1, 2, 3
"""Kinds. The first is of no record on disk: what one that is damaged becomes when it is read."""
CHECKED = struct.Struct("<28sI")
"""What the checksum of a record is of, and the checksum."""
SIZE = 0xFFFFFFFF
"""The bits of `lost` in which a record of data has its size."""
KIND, BODY, CHECKSUM = itemgetter(2, 3), itemgetter(0), itemgetter(1)
KINDS = frozenset({(DATA, 1), (DATA, 2), (END, 0)})
STREAMS = {1: Stream.STDOUT, 2: Stream.STDERR}
INDEX_PAGE = 128
"""Index records read at once: 4 KiB."""
HEXADECIMAL = frozenset("0123456789abcdef")
OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""A segment is a regular file of the shim's: nothing else is followed or waited for."""
LISTINGS = 100
"""How often a log is listed anew whose segments go away faster than they can be opened."""
GAP_REASONS = ("write_error", "output_limit")
"""By the number that a gap record has in the place of its stream."""


class Record(NamedTuple):
    """One record of an index; a tuple, because readers make millions of them."""

    end: int
    time_ns: int
    kind: int
    stream: int
    lost: int

    @property
    def size(self) -> int | None:
        """Bytes that a record of data covers. None: one of a shim that did not say, and they begin where those before end."""
        return self.lost & SIZE if self.kind == DATA and self.lost else None

    @property
    def gap_reason(self) -> str:
        """Why the bytes that a gap record tells are missing; a number of a newer shim reads as the first."""
        return GAP_REASONS[self.stream if self.stream < len(GAP_REASONS) else 0]


def list_segments(directory: Path) -> list[int]:
    """First offsets of the segments that are there, in order. A segment counts once its index exists."""
    names = [name.removesuffix(".idx") for name in os.listdir(directory) if name.endswith(".idx")]
    return sorted(int(name, 16) for name in names if len(name) == 16 and HEXADECIMAL.issuperset(name))


def segment_path(directory: Path, base: int) -> Path:
    return directory / f"{base:016x}"


def read_at(fd: int, size: int, offset: int, nowait: bool) -> bytes:
    """Up to `size` bytes at `offset`; fewer only at the end of the file. BlockingIOError if `nowait` and the disk would be read."""
    parts: list[bytes] = []
    while size > 0:
        part = _read_nowait(fd, size, offset) if nowait else os.pread(fd, size, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_nowait(fd: int, size: int, offset: int) -> bytes:
    buffer = bytearray(size)
    try:
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:  # tmpfs before 6.x: always in memory, so a plain read does not block
            raise
        return os.pread(fd, size, offset)
    return bytes(memoryview(buffer)[:count])


def parse_records(raw: bytes, number: int, base: int) -> list[Record]:
    """The whole records in these bytes, the first of which has this number in its index; damaged ones are told as such."""
    raw = raw[: len(raw) - len(raw) % RECORD.size]
    records = list(map(Record._make, RECORD.iter_unpack(raw)))
    checked = tuple(CHECKED.iter_unpack(raw))
    # Readers do this millions of times: a page of nothing but good data costs no step of Python's for each record.
    if KINDS.issuperset(map(KIND, records)) and [*map(zlib.crc32, map(BODY, checked))] == [*map(CHECKSUM, checked)]:
        return records
    return [
        record if _is_whole(record, body, number + at, base) else record._replace(kind=DAMAGED)
        for at, (record, (body, _)) in enumerate(zip(records, checked, strict=True))
    ]


def _is_whole(record: Record, checked: bytes, number: int, base: int) -> bool:
    if record.kind == GAP:
        return not number and record.end == base and 0 < record.lost <= base
    known = (record.kind == DATA and record.stream in STREAMS) or (record.kind == END and not record.stream)
    return known and (not record.lost or zlib.crc32(checked) == record.lost >> 32)


class Segment:
    """One open segment: its two files, and the page of index records last read."""

    def __init__(self, directory: Path, base: int) -> None:
        """Open both files. FileNotFoundError if retention has taken the segment away."""
        path = segment_path(directory, base)
        self.base = base
        self._index = os.open(f"{path}.idx", OPEN)
        try:
            self._data = os.open(path, OPEN)
        except OSError:
            os.close(self._index)
            raise
        self._page: list[Record] = []
        self._page_start = 0

    def __repr__(self) -> str:
        return f"<Segment {self.base:016x}>"

    def close(self) -> None:
        os.close(self._index)
        os.close(self._data)

    def record(self, number: int, nowait: bool) -> Record | None:
        """The index record of this number, None if it is not there yet. A partial last record is not there, nor one of zeros."""
        position = number - self._page_start
        if not 0 <= position < len(self._page):
            raw = read_at(self._index, INDEX_PAGE * RECORD.size, number * RECORD.size, nowait)
            self._page = parse_records(raw, number, self.base)
            self._page_start, position = number, 0
        record = self._page[position] if self._page else None
        return None if record is None or (record.kind == DAMAGED and number >= self.records()) else record

    def last(self) -> Record | None:
        """The last record that is not damaged."""
        return next((record for _, record in self.backwards() if record.kind != DAMAGED), None)

    def records(self) -> int:
        """How many whole records the index has now. Zeros at its end are none: a host without power had made room for them."""
        count = os.fstat(self._index).st_size // RECORD.size
        while count and not any(os.pread(self._index, RECORD.size, (count - 1) * RECORD.size)):
            count -= 1
        return count

    def find(self, offset: int, nowait: bool) -> int:
        """The number of the first record that ends after `offset`, the count of records if none does; of damaged ones before it."""
        return self._bisect(lambda record: record.end > offset, nowait)

    def find_time(self, time_ns: int) -> int:
        """The number of the first record of this time or later, the count of records if there is none; of damaged ones before it.

        Where the clock was set back in between, a record of this time or later with an earlier one before it.
        """
        return self._bisect(lambda record: record.time_ns >= time_ns, nowait=False)

    def _bisect(self, reached: Callable[[Record], bool], nowait: bool) -> int:
        low, high = 0, self.records()
        while low < high:
            middle = number = (low + high) // 2
            while (record := self._read(number, nowait)).kind == DAMAGED and number > low:
                number -= 1
            if record.kind != DAMAGED and reached(record):
                high = number
            else:
                low = middle + 1
        while low and self._read(low - 1, nowait).kind == DAMAGED:
            low -= 1
        return low

    def _read(self, number: int, nowait: bool) -> Record:
        """One that is there."""
        return parse_records(read_at(self._index, RECORD.size, number * RECORD.size, nowait), number, self.base)[0]

    def backwards(self) -> Iterator[tuple[int, Record]]:
        """What the index has now from its end on, a page at a time: each record with the offset of its first byte."""
        stop = self.records()
        while stop:
            start = max(0, stop - INDEX_PAGE)
            # With the record before the page: where it ends, the page's first begins.
            before = min(start, 1)
            raw = read_at(self._index, (stop - start + before) * RECORD.size, (start - before) * RECORD.size, nowait=False)
            page = parse_records(raw, start - before, self.base)
            for number in range(len(page) - 1, before - 1, -1):
                record = page[number]
                if record.kind == DATA and record.size is None:
                    yield (page[number - 1].end if number else self.base), record
                else:
                    yield record.end - (record.size or 0), record
            stop = start

    def data_end(self) -> int:
        """The offset after the last byte that is there now."""
        return self.base + os.fstat(self._data).st_size

    def data(self, offset: int, size: int, nowait: bool) -> bytes:
        """Bytes of the log at an offset; what the index covers is there in full."""
        return read_at(self._data, size, offset - self.base, nowait)


def last_end(directory: Path) -> tuple[int, int]:
    """(first offset that is still there, end offset) of a log; (0, 0) if there is none yet. FileNotFoundError if it was removed."""
    for _ in range(LISTINGS):
        bases = list_segments(directory)
        with contextlib.suppress(FileNotFoundError):  # retention took it after it was listed: list again
            return (bases[0], _last_end(directory, bases)) if bases else (0, 0)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))


def _last_end(directory: Path, bases: list[int]) -> int:
    for base in reversed(bases):
        with contextlib.closing(Segment(directory, base)) as segment:
            record = segment.last()
        if record is not None:
            return record.end
    return bases[0]
