"""Looks at directories of a file server that is dead."""

from __future__ import annotations

import threading

import anyio
import anyio.to_thread
import pytest

from jobrunner.places import Looks
from tests.support.shim import wait_until
from tests.support.timing import at_most


async def test_looks_of_one_user_that_hang_are_no_others() -> None:
    looks, back, begun = Looks(8), threading.Event(), threading.Semaphore(0)

    def hang() -> None:
        begun.release()
        back.wait()

    async def look(user: str) -> None:
        with pytest.raises(TimeoutError):
            await looks.run(user, 0.5, hang)

    try:
        for user, number in (("alice", 2), ("bob", 2), ("carol", 2), ("dave", 1)):
            async with anyio.create_task_group() as group:
                for _ in range(number):
                    group.start_soon(look, user)
            for _ in range(number):
                assert begun.acquire(timeout=at_most(10))
        with pytest.raises(TimeoutError):
            await looks.run("alice", at_most(10), lambda: None)
        assert await looks.run("dave", at_most(10), lambda: "answered") == "answered"
        await look("dave")
        with pytest.raises(TimeoutError):
            await looks.run("erin", at_most(10), lambda: None)
    finally:
        back.set()
    await anyio.to_thread.run_sync(wait_until, lambda: not looks._under_way)
    assert await looks.run("alice", at_most(10), lambda: "answered") == "answered"
