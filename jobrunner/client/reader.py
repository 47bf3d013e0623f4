"""A job's output read from a server.

One task per reader receives ahead of the caller, at most PREFETCH bytes; so `next_nowait` can say what is there, and a caller that
cancels its wait loses nothing. What is received and not yet taken is all that a reader holds: HTTP/2's window does the rest.

A subscription that breaks off is followed by another one from the offset after the last byte received (`resume`). A caller that
reads nothing for long has its subscription ended by the server; when it reads on there is another one, without a word. What a
server sends that cannot come next is an error, and not shown (`sequence`).
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from grpclib.client import Stream as Call

from jobrunner.client.errors import translated
from jobrunner.client.resume import Attempts
from jobrunner.client.sequence import Sequence
from jobrunner.errors import InternalError, JobRunnerError, LimitReached, WouldBlock
from jobrunner.output import Begin, Chunk, End, OutputReader, Selection
from jobrunner.wire import messages as pb
from jobrunner.wire.convert import selection_to_wire
from jobrunner.wire.encode import Encoded, decode_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from jobrunner.client.channel import ClientChannel
    from jobrunner.client.resume import Connection
    from jobrunner.job import Gap

__all__ = ["ClientOutputReader"]

PREFETCH = 1024 * 1024
"""Bytes held for the caller at most, and one message more."""
_OVERHEAD = 512
"""What a part weighs in memory besides its bytes."""

OutputCall = Call[pb.JobSubscriptionRequest, Encoded]


class ClientOutputReader(OutputReader):
    """A reader across the network. `offset` is where the next part will begin: a new reader from there goes on without loss."""

    def __init__(
        self, channel: ClientChannel, connection: Connection, call: Callable[[], OutputCall], job_id: str, selection: Selection
    ) -> None:
        super().__init__()
        self.job_id = job_id
        self.offset = selection.offset
        self._channel = channel
        self._connection = connection
        self._call = call
        self._selection = selection
        self._sequence = Sequence(job_id, selection)
        self._parts: deque[Chunk | Gap] = deque()
        self._held = 0
        self._last: End | JobRunnerError | None = None
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<ClientOutputReader {self.job_id} offset={self.offset} held={self._held} last={self._last!r}>"

    async def __anext__(self) -> Chunk | Gap:
        while True:
            try:
                part = self.next_nowait()
            except WouldBlock:
                self._changed.clear()
                await self._changed.wait()
                continue
            if part is None:
                raise StopAsyncIteration
            return part

    def next_nowait(self) -> Chunk | Gap | None:
        if self._task is None and not self._closed:
            self._task = asyncio.create_task(self._receive(), name=f"output of {self.job_id}")
        if self._parts:
            part = self._parts.popleft()
            self._held -= _weight(part)
            self._room.set()
            self.offset = _next_offset(part)
            return part
        if isinstance(self._last, JobRunnerError):
            raise self._last
        if self._last is not None:
            self.end = self._last
            return None
        if self._closed:
            raise JobRunnerError(f"cannot read log of job {self.job_id}: the reader is closed")
        raise WouldBlock

    async def aclose(self) -> None:
        self._closed = True
        self._changed.set()
        task = self._task
        if task is None or task.done():
            return
        task.cancel()
        # Not awaited through the task itself: a cancellation of this call must not look like the task's own.
        await asyncio.wait([task])

    async def _receive(self) -> None:
        """Receive until the end, an error that no new subscription would mend, or `aclose`."""
        attempts = Attempts(self._connection, self._channel)
        try:
            while self._last is None:
                before = self._sequence.received_to
                try:
                    await self._subscribe(attempts)
                except LimitReached as exc:
                    if exc.retry_after:
                        await asyncio.sleep(exc.retry_after * random.uniform(1.0, 1.5))
                    elif self._sequence.received_to == before:  # a bound that has nothing to do with how slowly we read
                        raise
                except JobRunnerError as exc:
                    await attempts.again(exc)
        except JobRunnerError as exc:
            self._last = self._last or exc
        except Exception as exc:
            self._last = InternalError(f"cannot read log of job {self.job_id}: {exc!r}")
            self._last.__cause__ = exc
        finally:
            self._changed.set()

    async def _subscribe(self, attempts: Attempts) -> None:
        """One subscription; returns after END, raises for every other way in which it stops."""
        request = selection_to_wire(self.job_id, self._rest())
        verb = f"read log of job {self.job_id}"
        async with translated(self._channel, verb) as attempt, self._call() as call:
            attempt.call = call
            await call.send_message(request, end=True)
            await call.recv_initial_metadata()
            attempts.answered()
            while (message := await _message(call)) is not None:
                part = decode_output(message)
                attempts.progress()
                if part is not None:
                    self._sequence.take(part)
                if isinstance(part, End):
                    self._last = part
                    self._changed.set()
                elif isinstance(part, Begin):
                    self.offset = max(self.offset, part.offset)
                elif part is not None:
                    await self._put(part)
            # Asked for by hand: on its way out grpclib skips the trailers, and with them a status that is not OK, if the
            # server has closed the connection by then.
            await call.recv_trailing_metadata()
        if self._last is None:
            offset = self._rest().offset
            raise InternalError(f"cannot read log of job {self.job_id}: it stopped at offset {offset} without its end")

    def _rest(self) -> Selection:
        """What is still to be asked for. `since` until something has come: it may be a time that is still to come."""
        sequence = self._sequence
        if sequence.received_to is not None:
            return replace(self._selection, offset=sequence.received_to, tail=None, since=None)
        if sequence.begin is not None:
            return replace(self._selection, offset=sequence.begin.offset, tail=None)
        return self._selection

    async def _put(self, part: Chunk | Gap) -> None:
        wanted = self._wanted(part) if isinstance(part, Chunk) else part
        if wanted is None:
            return
        self._parts.append(wanted)
        self._held += _weight(wanted)
        self._changed.set()
        while self._held >= PREFETCH:
            self._room.clear()
            await self._room.wait()

    def _wanted(self, chunk: Chunk) -> Chunk | None:
        """Without what comes before the last lines of its stream, which a subscription from an offset gives too."""
        begin = self._sequence.begin
        before = begin.of(chunk.stream) - chunk.offset if begin is not None else 0
        if before <= 0:
            return chunk
        return replace(chunk, data=chunk.data[before:], offset=chunk.offset + before) if before < len(chunk.data) else None


async def _message(call: OutputCall) -> Encoded | None:
    """The next message, None after the last. GRPCError, by the status that follows, if the server ends the call within one."""
    try:
        return await call.recv_message()
    except AssertionError:  # grpclib's word for that
        await call.recv_trailing_metadata()
        raise


def _weight(part: Chunk | Gap) -> int:
    return _OVERHEAD + (len(part.data) if isinstance(part, Chunk) else 0)


def _next_offset(part: Chunk | Gap) -> int:
    return part.next_offset if isinstance(part, Chunk) else part.last + 1
