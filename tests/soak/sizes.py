"""How much of everything: by hand in full, in CI less of it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "SHORT", "Sizes"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sizes:
    lines: int
    """Numbered lines on stdout, before the random bytes."""
    random_bytes: int
    """On both streams together."""
    followers: int
    flood_bytes: int
    """What a job writes while its followers stall."""
    stalled: int
    """Followers that stall."""
    endings: int
    """Jobs that end the instant after their last write."""
    outage: float
    """Seconds for which the server is dead."""
    burst: int
    """Bytes that a job writes at once in that time, again and again."""
    longest: float
    """Seconds after which a round has failed."""


FULL = Sizes(
    lines=10**7,
    random_bytes=256 * MIB,
    followers=32,
    flood_bytes=10 << 30,
    stalled=100,
    endings=2000,
    outage=2100,
    burst=100 * MIB,
    longest=7200,
)
SHORT = Sizes(
    lines=200_000,
    random_bytes=4 * MIB,
    followers=32,
    flood_bytes=1 << 30,
    stalled=100,
    endings=200,
    outage=15,
    burst=4 * MIB,
    longest=300,
)
