"""What counts what users take: buckets, places and lanes, by themselves."""

from __future__ import annotations

import asyncio
from functools import partial

import anyio
import anyio.lowlevel
import pytest

from jobrunner.errors import LimitReached
from jobrunner.server.limits import Bucket, Counted, Lanes, Rate
from tests.support.server import eventually


async def test_what_takes_long_has_lanes_and_the_others_wait() -> None:
    lanes, open_, at_work = Lanes(2), anyio.Event(), []

    async def call(user: str) -> None:
        async with lanes.one(user):
            at_work.append(user)
            await open_.wait()

    async with anyio.create_task_group() as group:
        for user in ("a", "a", "a", "b"):
            group.start_soon(call, user)
        await eventually(lambda: len(lanes) == 4)
        assert sorted(at_work) == ["a", "a", "b"]
        open_.set()
    assert (len(at_work), len(lanes), len(lanes._lanes)) == (4, 0, 0)


def test_a_bucket_gives_what_it_holds_and_then_its_rate() -> None:
    now = 0.0
    bucket = Bucket(2.0, lambda: now)
    assert [bucket.take() for _ in range(20)] == [0.0] * 20
    assert [bucket.take() for _ in range(3)] == [pytest.approx(wait) for wait in (0.5, 1.0, 1.5)]
    now += 0.5
    assert bucket.take() == 0.0  # who waited as told
    assert not bucket.overdrawn


def test_a_bucket_knows_who_does_not_listen_and_forgives() -> None:
    now = 0.0
    bucket = Bucket(2.0, lambda: now)
    waits = [bucket.take() for _ in range(100)]
    assert max(waits) == pytest.approx(10.5)
    assert bucket.overdrawn is True
    now += 10.0
    assert [bucket.take() for _ in range(20)] == [0.0] * 20
    assert bucket.overdrawn is False


def test_buckets_that_are_full_again_are_forgotten() -> None:
    now = 0.0
    rate = Rate("max_calls_per_second", 1.0, "calls", lambda: now)
    for number in range(5000):
        now += 0.02
        rate.charge(f"user {number}", "call X")
    assert len(rate._buckets) <= 1025


def test_a_flood_of_names_does_not_look_at_all_buckets_for_each() -> None:
    asked = 0

    def clock() -> float:
        nonlocal asked
        asked += 1
        return 0.0

    rate = Rate("lines", 1.0, "lines", clock)
    for number in range(50_000):
        rate.of(f"10.0.0.{number}").take()
    assert asked < 10 * 50_000


def test_what_is_counted_is_given_back_also_after_an_error() -> None:
    counted = Counted("max_followers_per_job", 1)
    for _ in range(3):
        with pytest.raises(ValueError, match="inside"), counted.one_more("a", "read", "full"):
            raise ValueError("inside")
    assert len(counted) == 0
    with (
        counted.one_more("a", "read", "full"),
        counted.one_more("b", "read", "full"),
        pytest.raises(LimitReached, match=r"cannot read: full \(max_followers_per_job\)"),
        counted.one_more("a", "read", "full"),
    ):
        pass


async def test_who_is_cancelled_in_a_lane_keeps_a_place_only_if_his_work_has_begun() -> None:
    lanes, over, done = Lanes(1), anyio.Event(), []

    async def work(name: str) -> None:
        await over.wait()
        done.append(name)

    first, second = (asyncio.create_task(lanes.to_its_end("alice", partial(work, name))) for name in ("first", "second"))
    await eventually(lambda: len(lanes) == 2)
    for task in (first, second):
        task.cancel()
    await asyncio.wait([first, second])
    third = asyncio.create_task(lanes.to_its_end("alice", partial(work, "third")))
    await eventually(lambda: len(lanes) == 2)
    over.set()
    await third
    assert done == ["first", "third"]
    assert len(lanes) == 0
