"""One subscriber of one log: a cursor, and no queue. Late and live readers run the same lines.

cursor ──► Chunk or Gap: that is it
   │ nothing more
   ├─ END, or the job has ended and nothing was added since: the end
   └─ otherwise: caught up; wait for inotify, or for `until`
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

import anyio

from jobrunner.errors import OffsetOutOfRange, WouldBlock
from jobrunner.job import EndReason, Gap, JobInfo
from jobrunner.log.chunks import BLOCK, LARGE, ChunkCache
from jobrunner.log.cursor import Cursor, Step
from jobrunner.log.segments import GAP_REASONS, last_end
from jobrunner.output import Begin, Chunk, End, OutputReader, Selection

__all__ = ["Log", "LogReader"]

LATE = 0.25
"""Seconds after `until` at which what was read before it has been written: a shim may be held back by its job's CPU limit."""

MESSAGE = 64
"""Bytes that a chunk's message has besides its own, at most."""


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
        self._readers: WeakSet[LogReader] = WeakSet()

    def __repr__(self) -> str:
        return f"<Log {self.owner.job_id}>"

    def bounds(self) -> tuple[int, int]:
        """(first offset that is still there, offset after the last byte)."""
        try:
            return last_end(self.directory)
        except FileNotFoundError:  # removed, or a segment that retention took between listing and opening it
            return (0, 0)

    @property
    def is_read(self) -> bool:
        """Whether a reader is open."""
        return len(self._readers) > 0

    def reader(self, selection: Selection) -> LogReader:
        reader = LogReader(self, selection)
        self._readers.add(reader)
        return reader

    def closed(self, reader: LogReader) -> None:
        self._readers.discard(reader)

    def changed(self) -> Awaitable[object]:
        return self._changed(str(self.directory))


class LogReader(OutputReader):
    """One subscriber; see the module."""

    def __init__(self, log: Log, selection: Selection) -> None:
        super().__init__()
        self._log = log
        self._selection = selection
        self._cursor = Cursor(log.owner.job_id, log.directory, log.cache, selection)
        self._locating: asyncio.Future[Begin] | None = None
        self._thread: asyncio.Future[Chunk | Gap | Step] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<LogReader {self._log.owner.job_id} at {self.offset}>"

    @property
    def offset(self) -> int:
        """Of the next byte that this reader has not given."""
        return self._cursor.offset

    def take_at_once(self, size: int) -> None:
        """How many bytes the caller takes of the next chunk without having to wait; a chunk is a large one only if it fits."""
        self._cursor.block = LARGE if size >= LARGE + MESSAGE else BLOCK

    async def locate(self) -> Begin:
        """Find where to begin. The first read does it otherwise; for `tail` what is there at this moment counts."""
        cursor = self._cursor
        if cursor.begin is None and not cursor.must_search:
            self._locate_now()
        while cursor.begin is None:
            if self._locating is None:
                self._locating = asyncio.get_running_loop().run_in_executor(None, self._locate_now)
            await asyncio.wait((self._locating,))  # a wait that is cancelled leaves it to the next one
            self._locating.result()
        return cursor.begin

    def _locate_now(self) -> Begin:
        if not self._selection.follow and not self._log.owner.ended:
            # A job may write faster than anyone reads: what is there now is all that is asked for.
            self._cursor.stop = self._log.bounds()[1]
        return self._cursor.locate(lambda: self._closed)

    async def __anext__(self) -> Chunk | Gap:
        await self.locate()
        watch: Awaitable[object] | None = None
        while self.end is None and not self._closed:
            # Order: whether the job has ended, or the time has come, is asked before the read, so that nothing before it is missed.
            ended, passed = self._log.owner.ended, self._until_in() <= 0
            part = await self._advance()
            if part is Step.NOTHING and ended:
                part = self._missing_end()
            if isinstance(part, Chunk | Gap):
                return part
            if part is Step.MOVED:
                await asyncio.sleep(0)
            elif part is not Step.NOTHING or ended or passed or not self._selection.follow:
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
        if self._thread is not None or (self._locating is not None and self._cursor.begin is None):
            raise WouldBlock  # a wait that was cancelled left its read under way: `__anext__` takes it up
        if self._cursor.begin is None:
            self._locate_now()
        ended, passed = self._log.owner.ended, self._until_in() <= 0
        while (part := self._cursor.advance(nowait=False)) is Step.MOVED:
            pass
        if part is Step.NOTHING and ended:
            part = self._missing_end()
        if isinstance(part, Chunk | Gap):
            return part
        if part is Step.NOTHING and not ended and not passed and self._selection.follow:
            raise WouldBlock
        self._check_range(part, ended)
        self.end = End(self.offset, self._log.owner.info())
        return None

    def _until_in(self) -> float:
        """Seconds until nothing that is wanted can come any more."""
        return math.inf if self._cursor.until is None else self._cursor.until / 1e9 + LATE - time.time()

    def _missing_end(self) -> Gap | Step:
        """A log that ends before its job's last byte: the disk was full to the very end, and no record of that found a place.

        Or it is damaged. When these bytes were read is unknown, so they are told whatever time is wanted.
        """
        info = self._log.owner.info()
        first, total = self.offset, info.log_end
        if first >= total:
            return Step.NOTHING
        self._cursor.offset = total
        lost = info.end_reason is EndReason.LOST or self._cursor.hole
        return Gap(first, total - 1, "lost" if lost else GAP_REASONS[0])

    async def aclose(self) -> None:
        self._closed = True
        self._log.closed(self)
        if self._thread is not None and not self._thread.done():
            # A cancelled reader's thread may still read: the files are closed after it, or it would read a stranger's.
            self._thread.add_done_callback(self._release_after)
        else:
            self._cursor.close()

    def _release_after(self, thread: asyncio.Future[Chunk | Gap | Step]) -> None:
        if not thread.cancelled():
            thread.exception()  # nobody waits for it any more
        self._cursor.close()

    async def _finish(self, part: Step, passed: bool) -> None:
        owner = self._log.owner
        follow = self._selection.follow and part is not Step.UNTIL and not passed
        info = await owner.wait() if follow else owner.info()
        self._check_range(part, owner.ended)
        self.end = End(self.offset, info)
        self._cursor.close()

    def _check_range(self, part: object, ended: bool) -> None:
        if not self._cursor.in_segment and part is Step.NOTHING and ended and self.offset:
            end = max(self._log.bounds()[1], self._log.owner.info().log_end)
            if self.offset > end:
                raise OffsetOutOfRange(self._log.owner.job_id, self.offset, end)

    async def _advance(self) -> Chunk | Gap | Step:
        """The next part, read on the loop if memory holds it and in a thread if not.

        A wait that is cancelled leaves the thread at its read. What it reads is the next part all the same, and nobody else may
        read meanwhile: the next call takes it up.
        """
        if self._thread is None:
            try:
                return self._cursor.advance(nowait=True)
            except BlockingIOError:
                self._thread = asyncio.get_running_loop().run_in_executor(None, self._cursor.advance, False)
        thread = self._thread
        await asyncio.wait((thread,))  # which, unlike awaiting it, does not cancel it
        self._thread = None
        return thread.result()
