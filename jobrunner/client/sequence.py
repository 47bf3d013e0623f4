"""What a server may send next of a log: its own word, taken at its word.

A log has one order, so whatever comes begins where the part before it has ended. A server that says otherwise is broken, or
something between is; then the reader fails at the offset up to which all was right, and shows nothing that it cannot vouch for.

    all of both streams        no byte twice, none left out but by a gap, and the end where the last part ended
    one stream                 no byte twice, and no offset backwards: what is left out is the other stream's
    the last lines, since      what comes before where each stream begins is passed over
"""

from __future__ import annotations

from jobrunner.errors import InternalError
from jobrunner.job import Gap, Stream
from jobrunner.output import Begin, Chunk, End, Selection

__all__ = ["Sequence"]


class Sequence:
    """The parts of one reader, over all of its subscriptions."""

    def __init__(self, job_id: str, selection: Selection) -> None:
        self._job_id = job_id
        self._selection = selection
        self.begin: Begin | None = None
        self.received_to: int | None = None
        """The offset after the last byte or gap that came; None before the first."""
        self._end: End | None = None

    def take(self, part: Chunk | Gap | Begin | End) -> None:
        """Raises InternalError if it cannot be what comes next."""
        if self._end is not None:
            raise self._broken("it goes on after its end")
        match part:
            case Begin():
                self._take_begin(part)
            case End():
                self._check(part.total_bytes, "its end")
                self._end = part
            case Gap():
                if part.last < part.first:
                    raise self._broken(f"a gap from {part.first} to {part.last}")
                self._check(part.first, "a gap")
                self.received_to = part.last + 1
            case Chunk():
                if part.stream not in self._selection.streams:
                    raise self._broken(f"{part.stream} was not asked for")
                self._check(part.offset, "bytes")
                self.received_to = part.next_offset

    def _take_begin(self, begin: Begin) -> None:
        asked = self._selection.tail is not None or self._selection.since is not None
        first = min(begin.of(stream) for stream in self._selection.streams)
        if not asked or self.received_to is not None or not self._selection.offset <= begin.offset <= first:
            raise self._broken(f"a beginning at {begin.offset} that was not asked for")
        self.begin = self.begin or begin

    def _check(self, offset: int, what: str) -> None:
        least, most = self._bounds()
        if offset < least:
            raise self._broken(f"{what} at {offset} after those before {least}")
        if most is not None and offset > most:
            raise self._broken(f"{what} at {offset} where {least} was next")

    def _bounds(self) -> tuple[int, int | None]:
        """Between which offsets the next part begins; None where what is left out may be what was not asked for."""
        begin, selection = self.begin, self._selection
        least = self.received_to
        if least is None:
            least = begin.offset if begin is not None else selection.offset
            if selection.since is not None or (selection.tail is not None and begin is None):
                return least, None
        if len(selection.streams) < len(Stream):
            return least, None
        return least, max(least, begin.stdout, begin.stderr) if begin is not None else least

    def _broken(self, what: str) -> InternalError:
        at = self._selection.offset if self.received_to is None else self.received_to
        return InternalError(f"cannot read log of job {self._job_id}: the server has sent {what}, at offset {at}")
