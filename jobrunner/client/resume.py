"""Going on after a lost connection: when to try again, when to give up, and whom to tell.

What may be asked again without harm is: a log from the offset after the last byte received, the end of a job, a stop, and a start,
which has a request id. Errors that a repetition would meet again (no such job, no permission, an offset past the end) are not.

Before the server has been reached once, an address where nobody answers, and a name that is none, are told at once. Only a first
connection that the server has closed before it said anything is made again, for FIRST_CONTACT seconds, whatever the call is: in a
flood of handshakes some honest ones have to give way.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from jobrunner.client.errors import Interrupted
from jobrunner.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from jobrunner.client.channel import ClientChannel
    from jobrunner.errors import JobRunnerError

__all__ = ["Attempts", "Connection"]

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before the second attempt, and at most; twice as long each time, times 0.5 to 1.5 so that many clients spread out."""
FIRST_CONTACT = 5.0
"""Seconds, or fewer if the client gives up sooner anyway."""
STABLE = 5.0
"""Seconds after which a connection that lasted counts as progress, although nothing came: a silent job is followed for days."""


class Connection:
    """What the calls of one client have in common: how long they try, and that a loss is told once, not by each of them."""

    def __init__(self, timeout: float, tell: Callable[[JobRunnerError | None], None] | None) -> None:
        """`timeout` in seconds without progress, 0 for no second attempt. `tell` is called with the error when the connection is
        lost, and with None when the server is reached again.
        """
        self.timeout = timeout
        self._tell = tell
        self._lost = False

    def __repr__(self) -> str:
        return f"<Connection {'lost' if self._lost else 'there'}>"

    def lost(self, error: JobRunnerError) -> None:
        if not self._lost:
            self._lost = True
            if self._tell is not None:
                self._tell(error)

    def back(self) -> None:
        if self._lost:
            self._lost = False
            if self._tell is not None:
                self._tell(None)


class Attempts:
    """The attempts at one call."""

    def __init__(self, connection: Connection, channel: ClientChannel) -> None:
        self._connection = connection
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._give_up_at: float | None = None
        self._pause = FIRST_PAUSE

    def answered(self) -> None:
        """The server has said something to this call."""
        self._connection.back()

    def progress(self) -> None:
        """Something of use has come: the time to give up, and the pauses, are counted anew."""
        self._give_up_at = None
        self._pause = FIRST_PAUSE
        self._connection.back()

    async def again(self, error: JobRunnerError) -> None:
        """Wait for the time of the next attempt. Raises the error if there shall be none."""
        reached = self._channel.reached
        if not isinstance(error, Unavailable if reached else Interrupted):
            raise error
        now = self._loop.time()
        if self._channel.lasted(self._begun) > STABLE:
            self.progress()
        if self._give_up_at is None:
            timeout = self._connection.timeout
            self._give_up_at = now + timeout if reached else self._channel.tried_at + min(timeout, FIRST_CONTACT)
        if now >= self._give_up_at:
            raise error
        if reached:
            self._connection.lost(error)
        await asyncio.sleep(min(self._pause * random.uniform(0.5, 1.5), self._give_up_at - now))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._begun = self._loop.time()
