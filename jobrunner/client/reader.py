"""A job's output read from a server.

One task per reader receives ahead of the caller, at most PREFETCH bytes; so `next_nowait` can say what is there, and a caller that
cancels its wait loses nothing. What is received and not yet taken is all that a reader holds: HTTP/2's window does the rest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from grpclib.client import Stream as Call

from jobrunner.client.errors import translated
from jobrunner.errors import InternalError, JobRunnerError, WouldBlock
from jobrunner.output import Chunk, End, OutputReader
from jobrunner.wire import messages as pb
from jobrunner.wire.convert import output_from_wire, streams_to_wire

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from jobrunner.client.channel import ClientChannel
    from jobrunner.job import Gap, Stream

__all__ = ["ClientOutputReader"]

PREFETCH = 1024 * 1024
"""Bytes held for the caller at most, and one message more."""
_OVERHEAD = 512
"""What a part weighs in memory besides its bytes."""

OutputCall = Call[pb.JobSubscriptionRequest, pb.JobOutputResponse]


class ClientOutputReader(OutputReader):
    """A reader across the network. `offset` is where the next part will begin: a new reader from there goes on without loss."""

    def __init__(
        self,
        channel: ClientChannel,
        call: Callable[[], OutputCall],
        job_id: str,
        offset: int,
        follow: bool,
        streams: Collection[Stream],
    ) -> None:
        super().__init__()
        self.job_id = job_id
        self.offset = offset
        self._channel = channel
        self._call = call
        self._follow = follow
        self._streams = frozenset(streams)
        self._received_to = offset
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
        """Receive until the end, an error or `aclose`. A lost connection is an error; one could resume at `_received_to`."""
        try:
            await self._subscribe()
        except JobRunnerError as exc:
            self._last = self._last or exc
        except Exception as exc:
            self._last = InternalError(f"cannot read log of job {self.job_id}: {exc!r}")
            self._last.__cause__ = exc
        finally:
            self._changed.set()

    async def _subscribe(self) -> None:
        """One subscription, from `_received_to` on; returns after END, raises for every other way in which it stops."""
        request = pb.JobSubscriptionRequest(
            job_id=self.job_id,
            offset=self._received_to,
            follow=self._follow,
            streams=streams_to_wire(self._streams),
        )
        verb = f"read log of job {self.job_id}"
        async with translated(self._channel, verb) as attempt, self._call() as call:
            attempt.call = call
            await call.send_message(request, end=True)
            while (message := await call.recv_message()) is not None:
                part = output_from_wire(message)
                if isinstance(part, End):
                    self._last = part
                    self._changed.set()
                elif part is not None:
                    await self._put(part)
            # Asked for by hand: on its way out grpclib skips the trailers, and with them a status that is not OK, if the
            # server has closed the connection by then.
            await call.recv_trailing_metadata()
        if self._last is None:
            raise InternalError(f"cannot read log of job {self.job_id}: it stopped at offset {self._received_to} without its end")

    async def _put(self, part: Chunk | Gap) -> None:
        self._parts.append(part)
        self._held += _weight(part)
        self._received_to = _next_offset(part)
        self._changed.set()
        while self._held >= PREFETCH:
            self._room.clear()
            await self._room.wait()


def _weight(part: Chunk | Gap) -> int:
    return _OVERHEAD + (len(part.data) if isinstance(part, Chunk) else 0)


def _next_offset(part: Chunk | Gap) -> int:
    return part.next_offset if isinstance(part, Chunk) else part.last + 1
