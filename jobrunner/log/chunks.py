"""From index records and bytes to the chunks that readers are given, and the cache of them that readers share."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict

from jobrunner.log.segments import DATA, SIZE, STREAMS, Segment
from jobrunner.output import Chunk

__all__ = ["BLOCK", "LARGE", "MERGE_NS", "ChunkCache", "cut_chunk"]

BLOCK = 16384 * 4 - 64
"""Chunks end at multiples of this, so that all readers cut a log into the same chunks. With its 5-byte prefix and the message's
tags a block fills four HTTP/2 frames of 16 KiB and no fifth."""
LARGE = 2 * BLOCK
"""The same for a reader that is known to take so much at once: a chunk costs what it costs, however long it is. A reader that has
to wait holds on to its chunk, so that must be a small one. Longer ones save little, and lose more with a connection; and what is
longer than 128 KiB comes from the C library in pages that are new each time (mallopt(3), M_MMAP_THRESHOLD)."""
MERGE_RECORDS = 128
MERGE_NS = 50_000_000
"""Records of one stream are given as one chunk while they are within 50 ms, so that a chunk's time is true to that."""
CACHE_BYTES = 8 << 20
ENTRY_BYTES = 512
"""What a chunk in the cache weighs besides its bytes: a job that writes a little at a time makes chunks of a few bytes."""


def cut_chunk(
    segment: Segment, number: int, offset: int, *, block: int, exact: bool, until: int | None, nowait: bool
) -> tuple[Chunk, int]:
    """The chunk at an offset that is in the data record of this number, and the number of the record that the byte after it is in.

    It ends at a multiple of `block` at the latest. With `exact` it is of this record alone. It ends before a record of the time
    `until`, in ns.
    """
    first = segment.record(number, nowait)
    assert first is not None
    border = (offset // block + 1) * block
    begun, last = number, first
    most = 1 if exact else MERGE_RECORDS
    before = min(first.time_ns + MERGE_NS + 1, math.inf if until is None else until)
    while last.end < border and number + 1 - begun < most:
        record = segment.record(number + 1, nowait)
        if record is None or (record.kind, record.stream) != (DATA, first.stream) or record.time_ns >= before:
            break
        if record.lost and record.end - (record.lost & SIZE) != last.end:  # as `record.size`, which costs a call
            break
        number, last = number + 1, record
    stop = min(last.end, border)
    data = segment.data(offset, stop - offset, nowait)
    # Rounded down, so that a time that was told is not after the record it was told of: as `since` it gives that record again.
    chunk = Chunk(STREAMS[first.stream], data, offset, first.time_ns // 1000 / 1_000_000)
    if len(data) < stop - offset:  # after a crash of the host: what is there; the reader finds that the rest is not
        number = segment.find(chunk.next_offset, nowait)
    elif last.end <= border:
        number += 1
    return chunk, number


class ChunkCache:
    """Chunks read last, of all logs of one runner, for the other readers that come to the same offset: bounded by bytes.

    An entry is the chunk and the number of the index record that the byte after it is in; each way to cut chunks has its own. A
    chunk never changes; what was read at the live end of a log is just shorter than what could be read there later.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        self._size = 0
        self._lock = threading.Lock()  # readers come from the loop and from threads
        self._entries: OrderedDict[tuple[str, int, int, bool], tuple[Chunk, int]] = OrderedDict()

    def get(self, log: str, offset: int, block: int, exact: bool) -> tuple[Chunk, int] | None:
        key = (log, offset, block, exact)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    def put(self, log: str, chunk: Chunk, next_record: int, block: int, exact: bool) -> None:
        key = (log, chunk.offset, block, exact)
        with self._lock:
            old = self._entries.pop(key, None)
            self._size += _weight(chunk) - (_weight(old[0]) if old else 0)
            self._entries[key] = (chunk, next_record)
            while self._size > self._limit:
                _, (dropped, _) = self._entries.popitem(last=False)
                self._size -= _weight(dropped)


def _weight(chunk: Chunk) -> int:
    return 2 * len(chunk.data) + ENTRY_BYTES  # itself, and its message
