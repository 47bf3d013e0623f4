"""A job's output as its readers see it, on this host and across the network: what to read, chunks, gaps, lines, and the end.

`OutputReader` is what `job.log(...)` gives in the library and in the SDK. It is an async iterator of `Chunk` and `Gap` that ends
after the last byte; `end` then says how. `next_line` and `next_line_nowait` are the original design's GetNextLine functions. Use
one of the two ways on one reader, not both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Self

from jobrunner.errors import InvalidRequest
from jobrunner.job import Gap, JobInfo, Stream

__all__ = ["MAX_LINE", "MAX_TIME", "Begin", "Chunk", "End", "Line", "LineAssembler", "OutputReader", "Selection"]

MAX_LINE = 1 << 20
"""Bytes of one line at most: a longer one is given in pieces of up to this size, each but the last without a newline. A piece is
up to 4 bytes shorter where it would end within a UTF-8 character or between CR and LF."""
MAX_OFFSET = 1 << 62
MAX_TIME = 253_402_300_800.0
"""The year 10000: the protocol's Timestamp ends there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which part of a log a reader gives. Checked once, here: InvalidRequest names the field."""

    offset: int = 0
    """Of the first byte, in the merged log of both streams."""
    follow: bool = True
    """To the job's end; otherwise as much as is there when the reader begins, and no more than a chunk beyond that."""
    streams: frozenset[Stream] = frozenset(Stream)
    """None means all."""
    tail: int | None = None
    """Only so many last lines of these streams, of what is there (from `since` to `until`) when the reader begins; a last line
    without newline counts. What is written after that follows."""
    since: float | None = None
    """From the first byte on that was read from the job at or after this time, seconds since the epoch."""
    until: float | None = None
    """Up to the first byte that was read from the job at or after this time; a reader that follows waits for no later time."""
    exact_times: bool = False
    """Each read of the shim is a chunk of its own, so that each byte's time is exact; otherwise a chunk spans up to 50 ms."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "streams", frozenset(self.streams) or frozenset(Stream))
        if not 0 <= self.offset <= MAX_OFFSET:
            reason = "is negative" if self.offset < 0 else "is past the end of any log"
            raise InvalidRequest("offset", f"{self.offset} {reason}", verb="read log")
        if self.tail is not None and self.tail < 0:
            raise InvalidRequest("tail", f"{self.tail} is negative", verb="read log")
        if self.tail is not None and self.offset:
            raise InvalidRequest("tail", "cannot be combined with an offset", verb="read log")
        for name, value in (("since", self.since), ("until", self.until)):
            if value is not None and not 0 <= value < MAX_TIME:
                raise InvalidRequest(name, f"{value} is no time in seconds since 1970", verb="read log")
        if self.since is not None and self.until is not None and self.until < self.since:
            raise InvalidRequest("until", "is before since", verb="read log")


@dataclass(frozen=True, slots=True)
class Begin:
    """Where a reader begins that was asked for `tail` or `since`; one from `offset` on gives the same.

    Less the bytes of a stream before its own offset, which are passed over: the last lines of two streams need not begin at one
    place.
    """

    offset: int
    stdout: int
    stderr: int

    def of(self, stream: Stream) -> int:
        """The first offset at which this stream's bytes are wanted."""
        return self.stdout if stream is Stream.STDOUT else self.stderr


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of one stream that stand together in the log."""

    stream: Stream
    data: bytes
    offset: int
    """Of the first byte, in the merged log of both streams."""
    time: float
    """When the first byte was read from the job, seconds since the epoch."""
    message: bytes | None = field(default=None, init=False, repr=False, compare=False)
    """Its encoding, once `wire.encode` has made it: the followers of a log share their chunks, and so that."""

    @property
    def next_offset(self) -> int:
        """Where a reader that has this chunk goes on."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of one stream.

    `data` ends with its newline, unless the line is longer than MAX_LINE, or the last before the end or a gap.
    """

    stream: Stream
    data: bytes
    offset: int
    time: float
    continues: bool = False
    """Whether this is a further piece of a line whose first piece was longer than MAX_LINE."""


@dataclass(frozen=True, slots=True)
class End:
    """The end of a log: bytes the job has written, and the job as it was then."""

    total_bytes: int
    info: JobInfo | None = None


class LineAssembler:
    """Puts lines together, for each stream by itself; holds at most MAX_LINE bytes of each."""

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max_line = max_line
        self._partial: dict[Stream, _Partial] = {}

    def __bool__(self) -> bool:
        """Whether part of a line is held."""
        return any(partial.data for partial in self._partial.values())

    def feed(self, chunk: Chunk) -> list[Line]:
        """The lines that this chunk completes."""
        lines: list[Line] = []
        position = 0
        partial = self._partial.pop(chunk.stream, None) or _Partial()
        while position < len(chunk.data):
            newline = chunk.data.find(b"\n", position)
            room = position + self._max_line - len(partial.data)
            stop = min(room, newline + 1 if newline >= 0 else len(chunk.data))
            partial.add(chunk.data[position:stop], chunk.offset + position, chunk.time)
            position = stop
            if partial.data.endswith(b"\n"):
                lines.append(partial.take(chunk.stream, len(partial.data)))
                partial = _Partial()
            elif len(partial.data) >= self._max_line:
                lines.append(partial.take(chunk.stream, whole(partial.data) or len(partial.data)))
        if partial.data or partial.continues:
            self._partial[chunk.stream] = partial
        return lines

    def flush(self) -> list[Line]:
        """What is held of unfinished lines now, in the order of their offsets; the rest of each will say that it `continues`."""
        sizes = {stream: whole(partial.data) for stream, partial in self._partial.items()}
        lines = [self._partial[stream].take(stream, size) for stream, size in sizes.items() if size]
        return sorted(lines, key=lambda line: line.offset)

    def finish(self) -> list[Line]:
        """What is left at the end of the log or before a gap: last lines without newline, in the order of their offsets."""
        rest = [partial.take(stream, len(partial.data)) for stream, partial in self._partial.items() if partial.data]
        self._partial.clear()
        return sorted(rest, key=lambda line: line.offset)


class _Partial:
    """The beginning of a line, or of a further piece of one that is too long."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.continues = False
        self._runs: list[tuple[int, int, float]] = []
        """Where bytes of one chunk begin in `data`, their offset and time: of the first byte, and of the last few, which may have
        to wait for the next piece."""

    def add(self, data: bytes, offset: int, time: float) -> None:
        self._runs.append((len(self.data), offset, time))
        self.data += data
        while len(self._runs) > 2 and self._runs[2][0] <= len(self.data) - TORN:
            del self._runs[1]

    def take(self, stream: Stream, size: int) -> Line:
        """The first `size` bytes as a line or a piece of one; what is after them stays."""
        _, offset, time = self._runs[0]
        line = Line(stream, bytes(self.data[:size]), offset, time, self.continues)
        at, offset, time = next(run for run in reversed(self._runs) if run[0] <= size)
        later = [(run[0] - size, *run[1:]) for run in self._runs if run[0] > size]
        self.data = self.data[size:]
        self.continues = True
        self._runs = [(0, offset + size - at, time), *later] if self.data else []
        return line


TORN = 4
"""Bytes at the end of a piece that may have to wait for the next one: part of a UTF-8 character, or CR."""


def whole(data: bytes | bytearray) -> int:
    """How many of these bytes can be cut off without tearing a UTF-8 character (RFC 3629) or CR LF apart."""
    if data.endswith(b"\r"):
        return len(data) - 1
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte >= 0xC0:  # the first byte of a character of 2 to 4 bytes
            size = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if size > back else len(data)
        if byte < 0x80:
            break
    return len(data)


class OutputReader(ABC, AsyncIterator[Chunk | Gap]):
    """One subscriber of one job's output, at its own pace. Close it (`async with`, or `aclose`) to free what it holds."""

    end: End | None = None
    """Set once the iteration is over."""
    lost: int = 0
    """Bytes of the gaps that `next_line` has passed over: lines cannot tell them, offsets show where."""

    def __init__(self) -> None:
        self._lines: deque[Line] = deque()
        self._assembler = LineAssembler()
        self._over = False

    @abstractmethod
    async def __anext__(self) -> Chunk | Gap:
        """The next part of the log; waits for it. StopAsyncIteration after the last."""

    @abstractmethod
    def next_nowait(self) -> Chunk | Gap | None:
        """The next part if it is there already; None at the end; WouldBlock if the job may still write it."""

    @abstractmethod
    async def aclose(self) -> None:
        """Free what the reader holds; may be called at any time, and twice."""

    async def next_line(self) -> Line | None:
        """The next line, waiting for it if need be; None at the end."""
        while not self._lines and not self._over:
            try:
                self._take(await anext(self))
            except StopAsyncIteration:
                self._take(None)
        return self._lines.popleft() if self._lines else None

    def next_line_nowait(self) -> Line | None:
        """The next line if it is there already; None at the end. Raises WouldBlock if none is there yet."""
        while not self._lines and not self._over:
            self._take(self.next_nowait())
        return self._lines.popleft() if self._lines else None

    def _take(self, part: Chunk | Gap | None) -> None:
        if isinstance(part, Chunk):
            self._lines.extend(self._assembler.feed(part))
            return
        self._lines.extend(self._assembler.finish())
        if part is None:
            self._over = True
        else:
            self.lost += part.last + 1 - part.first

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
