"""So many calls, so many at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import anyio

__all__ = ["at_once"]


async def at_once(in_flight: int, count: int, call: Callable[[int], Awaitable[object]]) -> None:
    """Call it with 0 to count - 1, `in_flight` of them at any time."""
    numbers: Iterator[int] = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await call(number)

    async with anyio.create_task_group() as group:
        for _ in range(min(in_flight, count)):
            group.start_soon(work)
