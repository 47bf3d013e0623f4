"""Whose turn it is: of what peers send, one piece of each of them is handled in a turn of the event loop.

Without this, a peer that sends thousands of small frames, or a few hundred connections of one user that each send some, would be
handled before anyone else is heard. Who sends little is handled at once; who sends much waits for nobody but himself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

__all__ = ["Turns"]


class Turns:
    """Work that waits, by the name of whose it is. A name holds memory only while there is work of it."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Callable[[], None]]] = {}

    def __repr__(self) -> str:
        return f"<Turns { ({name: len(queue) for name, queue in self._waiting.items()}) }>"

    def take(self, name: str, work: Callable[[], None]) -> None:
        """Do this now, or, if something of this name has been done in this turn of the loop, when it is its turn."""
        queue = self._waiting.get(name)
        if queue is not None:
            queue.append(work)
            return
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._next)
        self._waiting[name] = deque()
        work()

    def _next(self) -> None:
        for name, queue in list(self._waiting.items()):
            if not queue:
                del self._waiting[name]
                continue
            try:
                queue.popleft()()
            except Exception as exc:  # as the loop itself does: one's error is not the others'
                context = {"message": f"error in the turn of {name!r}", "exception": exc}
                asyncio.get_running_loop().call_exception_handler(context)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._next)
