"""Whose turn it is: how much is done for each name in one turn of the event loop, before others are heard.

Without `Turns`, a peer that sends thousands of small frames, or a few hundred connections of one user that each send some, would be
handled before anyone else. Without `Gate`, a few hundred followers of a job would each be sent something in every turn of the loop,
and a call takes several of these. Who wants little does not wait; who wants much waits for nobody but himself.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

__all__ = ["Gate", "Line", "Turns"]


class Turns:
    """Work that waits, by the name of whose it is. A name holds memory only while there is work of it."""

    def __init__(self, most: int = 1, of_all: float = math.inf) -> None:
        """So much of each name is done in a turn, and so much of all together."""
        self._most = most
        self._of_all = of_all
        self._done: Counter[str] = Counter()
        """In this turn."""
        self._waiting: dict[str, deque[Callable[[], None]]] = {}
        """In the order in which names come to their turn."""

    def __repr__(self) -> str:
        return f"<Turns {self._most} { ({name: len(queue) for name, queue in self._waiting.items()}) }>"

    def take(self, name: str, work: Callable[[], None]) -> None:
        """Do this now, or, if enough of this name or of all has been done in this turn of the loop, when it is its turn."""
        if not self._done and not self._waiting:
            asyncio.get_running_loop().call_soon(self._next)
        if name in self._waiting or self._room(name) <= 0:
            self._waiting.setdefault(name, deque()).append(work)
            return
        self._done[name] += 1
        work()

    def forget(self, name: str, work: Callable[[], None]) -> None:
        """If it still waits, it is not to be done any more."""
        queue = self._waiting.get(name, deque())
        if work in queue:
            queue.remove(work)  # `_next` takes the name out if it was the last

    def _room(self, name: str) -> float:
        """How much more of this name may be done in this turn."""
        return min(self._most - self._done[name], self._of_all - self._done.total())

    def _next(self) -> None:
        self._done.clear()
        for name, queue in list(self._waiting.items()):
            while queue and self._room(name) > 0:
                self._done[name] += 1
                self._do(name, queue.popleft())
            if queue and not self._done[name]:
                break  # it, and who comes after it, are the first in the next turn
            del self._waiting[name]
            if queue:
                self._waiting[name] = queue
        if self._done:
            asyncio.get_running_loop().call_soon(self._next)

    def _do(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as exc:  # as the loop itself does: one's error is not the others'
            context = {"message": f"error in the turn of {name!r}", "exception": exc}
            asyncio.get_running_loop().call_exception_handler(context)


class Gate:
    """Lets so many of each name pass in a turn of the loop; the others wait, in their order."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._passed: Counter[str] = Counter()
        """In this turn."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    def __repr__(self) -> str:
        return f"<Gate {self._most} { ({name: len(queue) for name, queue in self._waiting.items()}) }>"

    async def turn(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        if not self._passed and not self._waiting:
            loop.call_soon(self._next)
        if name not in self._waiting and self._passed[name] < self._most:
            self._passed[name] += 1
            return
        place: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(name, deque()).append(place)
        await place

    def _next(self) -> None:
        self._passed.clear()
        for name, queue in list(self._waiting.items()):
            while queue and self._passed[name] < self._most:
                place = queue.popleft()
                if not place.done():  # cancelled
                    place.set_result(None)
                    self._passed[name] += 1
            if not queue:
                del self._waiting[name]
        if self._passed:
            asyncio.get_running_loop().call_soon(self._next)


class Line:
    """Those who wait for the same thing, in their order: the first has the place, and leaves it when that is there."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._length = 0

    def __repr__(self) -> str:
        return f"<Line {self._length}>"

    @property
    def empty(self) -> bool:
        return not self._length

    @property
    def held(self) -> bool:
        """Whether somebody waits at its head; not from the moment when he leaves it until the next one comes there."""
        return self._lock.locked()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """At the head of the line."""
        self._length += 1
        try:
            async with self._lock:
                yield
        finally:
            self._length -= 1
