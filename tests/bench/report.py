"""What a part of the benchmark gives: figures for the JSON file, and a table for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Cell", "Part", "Sizes", "quantiles", "show"]

Cell = str | float | int


@dataclass(frozen=True, slots=True)
class Part:
    """One part's result; `figures` is what the JSON file keeps under its name."""

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    rounds: int = 200
    """Starts of each kind, one of each in turn."""
    jobs: int = 256
    """At each number in flight."""
    sleepers: int = 100
    log_bytes: int = 256 << 20
    followers: tuple[int, ...] = (1, 8, 64)
    lines: int = 2000
    """Whose way from the job to a follower is timed, 5 ms apart."""
    flood_bytes: int = 1 << 30
    single_bytes: int = 1_000_000
    floods: int = 3
    """Rounds of each flood."""
    kept: int = 20_000
    """Ended jobs that a server is started over."""
    restarted: int = 200
    """Running ones."""


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 of at least two values."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def show(part: Part) -> str:
    """The table as text; also valid Markdown."""
    rows = [list(part.header), *([_text(cell) for cell in row] for row in part.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(part.header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"### {part.title}", "", lines[0], rule, *lines[1:], ""])


def _text(cell: Cell) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) and cell < 100 else f"{cell:.0f}" if isinstance(cell, float) else str(cell)
