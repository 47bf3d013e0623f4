"""Bytes to standard output and standard error, all of them, in order, and off the event loop.

A thread writes, because nothing else is right for every kind of standard output: files cannot be polled (epoll_ctl(2): EPERM),
and making a pipe or terminal non-blocking would change it for every other process that shares it (fcntl(2): the flag is of the
open file description). The event loop stays free, so that Ctrl-C works while nobody reads; the thread is a daemon, so that a
write that never returns does not keep the process.
"""

from __future__ import annotations

import asyncio
import queue
import threading

from jobrunner.stdio import OutputClosed, OutputFailed, write_all

__all__ = ["OutputWriter"]

HELD = 4 * 1024 * 1024
"""Bytes that wait for the thread at most, and one chunk more."""


class OutputWriter:
    """Takes chunks from one event loop's tasks and writes them with one thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self._held = 0
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        threading.Thread(target=self._write_chunks, name="output", daemon=True).start()

    def __repr__(self) -> str:
        return f"<OutputWriter held={self._held} error={self._error!r}>"

    async def write(self, fd: int, data: bytes) -> None:
        """Hand over a chunk; waits while too much is held. Raises OutputClosed or OutputFailed for this or an earlier chunk."""
        self._held += len(data)
        self._chunks.put((fd, data))
        await self._wait_below(HELD)

    async def drain(self) -> None:
        """Return when all is written."""
        await self._wait_below(1)

    async def _wait_below(self, bound: int) -> None:
        while self._held >= bound and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error

    def _written(self, size: int, error: Exception | None) -> None:
        self._held -= size
        self._error = self._error or error
        self._changed.set()

    def _write_chunks(self) -> None:
        error: Exception | None = None
        while error is None:
            fd, data = self._chunks.get()
            try:
                write_all(fd, data)
            except (OutputClosed, OutputFailed) as exc:
                error = exc
            try:
                self._loop.call_soon_threadsafe(self._written, len(data), error)
            except RuntimeError:  # the loop is closed: the process is on its way out
                return
