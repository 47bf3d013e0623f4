"""What one user may take of the server: rates, as token buckets, numbers of things held at once, and lanes for what is long.

A bucket holds BURST seconds' worth: a script that makes many calls at once is not slowed down, a loop without a pause is.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from jobrunner.errors import LimitReached

__all__ = ["Bucket", "Counted", "Lanes", "Rate"]

Done = TypeVar("Done")

BURST = 10.0
A_FEW = 20.0
MAX_IDLE = 1024
"""Buckets that are kept although they are full again."""


class Bucket:
    """Tokens of one user. What was refused is counted too, and fades at the same rate: it tells who does not listen."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic, burst: float = BURST) -> None:
        self.per_second = per_second
        self.size = max(1.0, per_second * burst)
        self._most_refused = max(self.size, A_FEW)
        self._clock = clock
        self._tokens = self.size
        self._refused = 0.0
        self._at = clock()

    def __repr__(self) -> str:
        return f"<Bucket {self._tokens:g} of {self.size:g}, {self._refused:g} refused>"

    @property
    def full(self) -> bool:
        self._fill()
        return self._tokens >= self.size and not self._refused

    @property
    def overdrawn(self) -> bool:
        """Whether as much was refused lately as it holds, and more than a few."""
        return self._refused >= self._most_refused

    def take(self, tokens: int = 1) -> float:
        """0.0 if they were there; otherwise none is taken, and these are the seconds after which to ask again.

        Those who are refused together are told different times, one token apart.
        """
        self._fill()
        if tokens <= self._tokens:
            self._tokens -= tokens
            return 0.0
        wait = (tokens - self._tokens + self._refused) / self.per_second
        self._refused = min(self._refused + tokens, self._most_refused)
        return wait

    def _fill(self) -> None:
        now = self._clock()
        gained = (now - self._at) * self.per_second
        self._tokens = min(self.size, self._tokens + gained)
        self._refused = max(0.0, self._refused - gained)
        self._at = now


class Rate:
    """How many of something each user may do in a second."""

    def __init__(
        self, bound: str, per_second: float, what: str, clock: Callable[[], float] = time.monotonic, burst: float = BURST
    ) -> None:
        """`bound` is its name in the configuration; `what` is done: `calls`, `starts`; `burst` seconds' worth may come at once."""
        self.bound = bound
        self.per_second = per_second
        self._what = what
        self._clock = clock
        self._burst = burst
        self._buckets: dict[str, Bucket] = {}
        self._most = MAX_IDLE

    def of(self, user: str) -> Bucket:
        """The bucket of this user. Those that are full again are as good as new, and forgotten."""
        bucket = self._buckets.get(user)
        if bucket is None:
            if len(self._buckets) >= self._most:
                self._buckets = {name: known for name, known in self._buckets.items() if not known.full}
                self._most = max(MAX_IDLE, 2 * len(self._buckets))  # or a flood of names would look at all of them for each
            bucket = self._buckets[user] = Bucket(self.per_second, self._clock, self._burst)
        return bucket

    def charge(self, user: str, verb: str) -> None:
        """One more. Raises LimitReached with the time after which it may be tried again."""
        bucket = self.of(user)
        wait = bucket.take()
        if not wait:
            return
        reason = f'user "{user}" makes more than {self.per_second:g} {self._what} a second; try again in {wait:.2g} s'
        raise LimitReached(verb, self.bound, reason, retry_after=wait)


class Counted:
    """How many of something there may be at once for each key."""

    def __init__(self, bound: str, most: int) -> None:
        self.bound = bound
        self.most = most
        self._held: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._held.total()

    @contextmanager
    def one_more(self, key: str, verb: str, reason: str) -> Iterator[None]:
        """Hold one while inside. Raises LimitReached: `cannot VERB: REASON (bound)`."""
        if self._held[key] >= self.most:
            raise LimitReached(verb, self.bound, reason)
        self._held[key] += 1
        try:
            yield
        finally:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]


class Lanes:
    """How many of a user's calls are worked on at once; the others wait. For what takes long, and would fill a common queue."""

    def __init__(self, most: int) -> None:
        self._lanes: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(most))
        self._calls: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._calls.total()

    @asynccontextmanager
    async def one(self, user: str) -> AsyncIterator[None]:
        self._calls[user] += 1
        try:
            async with self._lanes[user]:
                yield
        finally:
            self._calls[user] -= 1
            if not self._calls[user]:
                del self._calls[user], self._lanes[user]

    async def to_its_end(self, user: str, work: Callable[[], Awaitable[Done]]) -> Done:
        """Work that goes on when its call is cancelled, and has its place as long. Who is still waiting then does not begin."""
        begun = False

        async def do() -> Done:
            nonlocal begun
            async with self.one(user):
                begun = True
                return await work()

        task = asyncio.get_running_loop().create_task(do())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not begun:
                task.cancel()
            raise
