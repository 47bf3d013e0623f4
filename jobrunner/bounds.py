"""What one peer can take of a server: each bound with its default, the least and the most that it may be, and what it counts.

docs/bounds.md is this table for operators, with what becomes of who meets a bound; a test holds the two together. What jobs may
take is in `limits`, how many of them may run in `config.RunnerConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from jobrunner import checked
from jobrunner.errors import ConfigError

__all__ = ["READERS", "Bounds"]

MANY = 1_000_000
FRAMES_PER_CALL, MIN_FRAMES = 8, 1000.0
"""Headers, message, reset, what the answer needs."""
MESSAGES_PER_USER = 8


def _bound(read: Callable[[object], Any], default: float, low: float, high: float) -> Any:
    return field(default=default, metadata={"read": checked.between(read, low, high)})


def _derived(read: Callable[[object], Any], low: float, high: float) -> Any:
    """Its default follows from another one."""
    return field(default=0, metadata={"read": checked.between(read, low, high)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Of one server; sizes in bytes, times in seconds. ConfigError if two of them contradict each other."""

    max_message: int = _bound(checked.size, 4 << 20, 65536, 1 << 30)
    """Of one request."""
    max_messages_per_user: int = _derived(checked.size, 65536, 1 << 40)
    """Of the unfinished calls of a user together, there or still coming. Eight `max_message` unless given."""
    max_fields: int = _bound(checked.whole, 65536, 256, 1 << 24)
    """In one message of a request."""
    max_header_size: int = _bound(checked.size, 16 << 10, 4096, 1 << 20)
    """Of a call, 32 added for each header (RFC 9113 section 6.5.2)."""
    max_connections: int = _bound(checked.whole, 512, 1, MANY)
    max_connections_per_user: int = _bound(checked.whole, 256, 1, MANY)
    max_pending_handshakes: int = _bound(checked.whole, 256, 1, MANY)
    """When as many are in their handshake, an old one gives way to the newest."""
    handshake_timeout: float = _bound(checked.seconds, 5.0, 0.1, 3600)
    max_streams_per_connection: int = _bound(checked.whole, 100, 1, MANY)
    """Calls at once on one connection."""
    max_calls_per_user: int = _bound(checked.whole, 4000, 1, MANY)
    """At once, on all connections: those that follow or wait."""
    max_starts_per_user: int = _bound(checked.whole, 16, 1, MANY)
    """That are worked on at once: enough for the cores of a large host, and another user's start waits for few."""
    max_searches_per_user: int = _bound(checked.whole, 2, 1, MANY)
    """Lists, and searches of a log for its last lines or for a time, that are worked on at once, of either so many."""
    max_calls_per_second: float = _bound(checked.number, 500.0, 0.1, MANY)
    """Of each user; ten seconds' worth may come at once. What comes too fast is told when to come again."""
    max_starts_per_second: float = _bound(checked.number, 100.0, 0.1, MANY)
    """Of each user, as above."""
    max_frames_per_second: float = _derived(checked.number, 100, 100 * MANY)
    """Small ones of HTTP/2, of each user; three seconds' worth may come at once. Unless given, eight for each call of
    `max_calls_per_second`, and 1,000 at least."""
    max_unread_answers: int = _bound(checked.size, 256 << 10, 16384, 1 << 30)
    """Answers to control frames (PING, SETTINGS) that a peer may leave unread."""
    max_followers_per_job: int = _bound(checked.whole, 1000, 1, MANY)
    """Readers of one job's output at once."""
    receive_timeout: float = _bound(checked.seconds, 60.0, 0.1, 86400)
    """Within which a message has to be there once it is due: a call's one, or what has begun of a stream's."""
    send_timeout: float = _bound(checked.seconds, 60.0, 0.1, 86400)
    """After which a stream whose peer takes nothing is ended."""

    def __post_init__(self) -> None:
        if not self.max_messages_per_user:
            object.__setattr__(self, "max_messages_per_user", MESSAGES_PER_USER * self.max_message)
        if not self.max_frames_per_second:
            frames = max(MIN_FRAMES, FRAMES_PER_CALL * self.max_calls_per_second)
            object.__setattr__(self, "max_frames_per_second", frames)
        if self.max_messages_per_user < self.max_message:
            reason = f"{self.max_messages_per_user} is less than max_message, {self.max_message}"
            raise ConfigError("configuration", f"max_messages_per_user: {reason}")


READERS = {one.name: one.metadata["read"] for one in fields(Bounds)}
"""How each is read, from whichever place."""
