"""What a runner has under way: work that is finished before the runner is closed, and work that goes on beside until then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from jobrunner.errors import JobRunnerError

__all__ = ["Tasks"]

logger = logging.getLogger(__name__)
T = TypeVar("T")
FINISH_TIMEOUT = 5.0
"""Seconds that what is half done gets to finish when the runner is closed; recovery does the rest."""


class Tasks:
    """The tasks of one runner. Nothing of theirs is lost: an error that nobody expected is told in the log."""

    def __init__(self) -> None:
        self._unfinished: set[asyncio.Task[Any]] = set()
        self._beside: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run what must not be cut in half."""
        return _begin(work, self._unfinished)

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what goes on until the runner is closed, at most."""
        _begin(work, self._beside)

    async def finished(self) -> None:
        """Wait until all that must not be cut in half, and is under way now, is done."""
        if self._unfinished:
            await asyncio.wait(self._unfinished, timeout=FINISH_TIMEOUT)

    def cancel_beside(self) -> None:
        for task in self._beside:
            task.cancel()


def _begin(work: Coroutine[Any, Any, T], kept: set[asyncio.Task[T]]) -> asyncio.Task[T]:
    task = asyncio.get_running_loop().create_task(work)
    kept.add(task)

    def over(task: asyncio.Task[T]) -> None:
        """Whoever awaits it hears of its error; what is no error of jobrunner's own vocabulary is a bug and told here too."""
        kept.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None and not isinstance(exc, JobRunnerError):
            logger.error("unexpected error in %s", task.get_name(), exc_info=exc)

    task.add_done_callback(over)
    return task
