"""`log --timestamps`: each line with the time at which its first byte was read from the job."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from jobrunner.output import LineAssembler

if TYPE_CHECKING:
    from jobrunner.job import Stream
    from jobrunner.output import Chunk, Line

__all__ = ["Stamper"]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Stamper:
    """Makes stamped bytes of chunks, whole lines at a time, so that lines of two streams that go to one place do not mix.

    A line that is longer than output.MAX_LINE, or whose rest is waited for, goes out in pieces, and only the first has a stamp.
    """

    def __init__(self) -> None:
        self._assembler = LineAssembler()
        self._open: set[Stream] = set()
        """Streams of which a line went out without its newline."""

    def __bool__(self) -> bool:
        """Whether part of a line is held."""
        return bool(self._assembler)

    def feed(self, chunk: Chunk) -> list[tuple[Stream, bytes]]:
        """What this chunk completes, one entry for each run of lines of one stream."""
        lines = self._assembler.feed(chunk)
        return [(chunk.stream, b"".join(map(self._stamped, lines)))] if lines else []

    def flush(self) -> list[tuple[Stream, bytes]]:
        """What is held of unfinished lines, because their rest may be long in coming."""
        return [(line.stream, self._stamped(line)) for line in self._assembler.flush()]

    def finish(self) -> list[tuple[Stream, bytes]]:
        """What is held at the end, or before a gap."""
        return [(line.stream, self._stamped(line)) for line in self._assembler.finish()]

    def _stamped(self, line: Line) -> bytes:
        begun = b"\n" if line.stream in self._open and not line.continues else b""  # a gap has cut the line before off
        if line.data.endswith(b"\n"):
            self._open.discard(line.stream)
        else:
            self._open.add(line.stream)
        return line.data if line.continues else b"%s%s %s" % (begun, stamp(line.time), line.data)


def stamp(seconds: float) -> bytes:
    """RFC 3339, in UTC, with microseconds."""
    moment = EPOCH + timedelta(microseconds=round(seconds * 1_000_000))
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
