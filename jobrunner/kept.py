"""The list of all jobs in memory: what is needed to find, order, filter and count them. Everything else is on disk.

An entry has a bounded size, whatever its job was asked to do: of labels it has a hash of each, so whoever filters by them looks at
the record as well. No I/O.
"""

from __future__ import annotations

import bisect
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jobrunner.job import JobStatus

__all__ = ["Entry", "Jobs", "Position", "hash_labels"]

Position = tuple[float, str]
"""When a job was created, or has ended, and its id: a place in an order that has no two jobs at one place."""


@dataclass(slots=True)
class Entry:
    """One job."""

    job_id: str
    created: float
    name: str = ""
    labels: bytes = b""
    request: bytes = b""
    """The key of its request id (requests.py)."""
    status: JobStatus = JobStatus.RUNNING
    ended: float = 0.0
    size: int = 0
    """Bytes of an ended job's log, and of its work directory where project quotas count them."""

    def may_have(self, labels: Mapping[str, str]) -> bool:
        """False if it certainly lacks one of these labels."""
        if not labels:
            return True
        there = {number for (number,) in struct.iter_unpack("q", self.labels)}
        return all(hash(label) in there for label in labels.items())


def hash_labels(labels: Mapping[str, str]) -> bytes:
    return b"".join(struct.pack("q", hash(label)) for label in labels.items())


class Jobs:
    """Entries by id, by the time of creation, and those that have ended by the time of that."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._by_created: list[Position] = []
        self._by_end: list[Position] = []
        self.size = 0
        """The same of all that have ended."""
        self.by_status: Counter[JobStatus] = Counter(dict.fromkeys(JobStatus, 0))
        """How many there are of each."""

    def __repr__(self) -> str:
        return f"<Jobs {len(self)} ended {self.ended} {self.size} bytes>"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._entries

    @property
    def ended(self) -> int:
        """How many of them have ended."""
        return len(self._by_end)

    def add(self, entry: Entry) -> None:
        self._entries[entry.job_id] = entry
        bisect.insort(self._by_created, (entry.created, entry.job_id))
        self.by_status[entry.status] += 1
        if entry.status is not JobStatus.RUNNING:
            self._count(entry)

    def end(self, job_id: str, status: JobStatus, ended: float, size: int) -> None:
        entry = self._entries.get(job_id)
        if entry is not None:
            self.by_status[entry.status] -= 1
            self.by_status[status] += 1
            entry.status, entry.ended, entry.size = status, ended, size
            self._count(entry)

    def remove(self, job_id: str) -> Entry | None:
        """Its entry, None if there is none."""
        entry = self._entries.pop(job_id, None)
        if entry is not None:
            _drop(self._by_created, (entry.created, job_id))
            self.by_status[entry.status] -= 1
            if entry.status is not JobStatus.RUNNING:
                _drop(self._by_end, (entry.ended, job_id))
                self.size -= entry.size
        return entry

    def newest_first(self, before: Position | None = None) -> Iterator[Entry]:
        """From this position on; jobs may come and go meanwhile."""
        while True:
            index = len(self._by_created) if before is None else bisect.bisect_left(self._by_created, before)
            if index == 0:
                return
            before = self._by_created[index - 1]
            yield self._entries[before[1]]

    def first_ended(self) -> Iterator[Entry]:
        """Those that have ended, the oldest end first. The list must not change meanwhile."""
        return (self._entries[job_id] for _, job_id in self._by_end)

    def _count(self, entry: Entry) -> None:
        bisect.insort(self._by_end, (entry.ended, entry.job_id))
        self.size += entry.size


def _drop(order: list[Position], position: Position) -> None:
    index = bisect.bisect_left(order, position)
    assert order[index] == position, position
    del order[index]
