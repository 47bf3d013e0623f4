"""Counters of a job's cgroup: one table, read here while the job runs and by the shim at its end (docs/formats.md, Counters)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from jobrunner.job import Usage
from jobrunner.linux.disk import passes_on
from jobrunner.linux.kernfs import read

__all__ = ["Counter", "usage_of"]

FIELDS = {
    "cpu_user_ns": "cpu_user",
    "cpu_system_ns": "cpu_system",
    "throttled_ns": "throttled",
}
"""The exit record's counters whose name in `Usage` is another, because there they are seconds."""


@dataclass(frozen=True, slots=True)
class Counter:
    """Where one number is: `key` is the word before it, or `-` for a file's first word."""

    field: str
    scale: int
    key: str
    path: str

    def item(self) -> tuple[str, str]:
        """As the shim is told."""
        return ("counter", f"{self.field} {self.scale} {self.key} {self.path}")

    def value(self, text: str) -> int | None:
        """The number in a file's text; None if it is not there. A text that is empty has nothing to tell yet: 0 of every key."""
        if not text and self.key != "-":
            return 0
        words = text.replace("=", " ").split()
        found = words[:1] if self.key == "-" else [after for word, after in pairwise(words) if word == self.key]
        if not found or not all(word.isascii() and word.isdigit() for word in found):
            return None
        return sum(map(int, found)) * self.scale


def usage_of(counters: Iterable[Counter]) -> Usage:
    """What the counters say now. A file is read once, however many of them are in it; what cannot be read is unknown."""
    texts: dict[str, str | None] = {}
    found: dict[str, float | None] = {}
    for counter in counters:
        if counter.path not in texts:
            try:
                texts[counter.path] = _of_disks(read(counter.path))
            except OSError:
                texts[counter.path] = None
        text = texts[counter.path]
        value = None if text is None else counter.value(text)
        seconds = counter.field in FIELDS and value is not None
        found[FIELDS.get(counter.field, counter.field)] = value / 1e9 if seconds and value is not None else value
    return Usage(**found)  # type: ignore[arg-type]  # the fields' types are those of the table


def _of_disks(text: str) -> str:
    """Without the lines of block devices that pass on what they are asked: those that they are made of have lines for it."""
    devices = dict.fromkeys(line.partition(" ")[0] for line in text.splitlines() if ":" in line)
    stacked = {device for device in devices if passes_on(device)}
    return "".join(line for line in text.splitlines(keepends=True) if line.partition(" ")[0] not in stacked) if stacked else text
