"""A job's output as its readers see it, on this host and across the network: chunks, gaps, lines, and the end.

`OutputReader` is what `job.log(...)` gives in the library and in the SDK. It is an async iterator of `Chunk` and `Gap` that ends
after the last byte; `end` then says how. `next_line` and `next_line_nowait` are the original design's GetNextLine functions. Use
one of the two ways on one reader, not both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Self

from jobrunner.job import Gap, JobInfo, Stream

__all__ = ["MAX_LINE", "Chunk", "End", "Line", "LineAssembler", "OutputReader"]

MAX_LINE = 1 << 20
"""Bytes of one line at most: a longer one is given in pieces of this size, each but the last without a newline."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of one stream that stand together in the log."""

    stream: Stream
    data: bytes
    offset: int
    """Of the first byte, in the merged log of both streams."""
    time: float
    """When the first byte was read from the job, seconds since the epoch."""

    @property
    def next_offset(self) -> int:
        """Where a reader that has this chunk goes on."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of one stream: `data` ends with its newline, unless it is the last of its stream or longer than MAX_LINE."""

    stream: Stream
    data: bytes
    offset: int
    time: float


@dataclass(frozen=True, slots=True)
class End:
    """The end of a log: bytes the job has written, and the job as it was then."""

    total_bytes: int
    info: JobInfo | None = None


class LineAssembler:
    """Puts lines together, for each stream by itself; holds at most MAX_LINE bytes of each."""

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max_line = max_line
        self._partial: dict[Stream, tuple[bytearray, int, float]] = {}

    def feed(self, chunk: Chunk) -> list[Line]:
        """The lines that this chunk completes."""
        lines: list[Line] = []
        position = 0
        while position < len(chunk.data):
            part, offset, time = self._partial.pop(chunk.stream, (bytearray(), chunk.offset + position, chunk.time))
            newline = chunk.data.find(b"\n", position)
            room = position + self._max_line - len(part)
            stop = min(room, newline + 1 if newline >= 0 else len(chunk.data))
            part += chunk.data[position:stop]
            position = stop
            if part.endswith(b"\n") or len(part) >= self._max_line:
                lines.append(Line(chunk.stream, bytes(part), offset, time))
            else:
                self._partial[chunk.stream] = (part, offset, time)
        return lines

    def finish(self) -> list[Line]:
        """What is left at the end of the log or before a gap: last lines without newline, in the order of their offsets."""
        rest = [Line(stream, bytes(part), offset, time) for stream, (part, offset, time) in self._partial.items()]
        self._partial.clear()
        return sorted(rest, key=lambda line: line.offset)


class OutputReader(ABC, AsyncIterator[Chunk | Gap]):
    """One subscriber of one job's output, at its own pace. Close it (`async with`, or `aclose`) to free what it holds."""

    end: End | None = None
    """Set once the iteration is over."""

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
        self._over = part is None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
