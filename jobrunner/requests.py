"""Request ids: which job each has started, so that a start that is asked for again happens once.

The job's own record has the request id, and is where it is found after a restart. A job that is removed leaves a line in the file
`requests` (docs/formats.md), good for 24 hours. Ids are scoped to the user; in memory and in the file are digests of a fixed size.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobrunner.durable import append_durably, read_file, write_durably
from jobrunner.job import is_job_id

if TYPE_CHECKING:
    from jobrunner.handle import RunnerJob

__all__ = ["Claim", "RequestIds", "request_key"]

logger = logging.getLogger(__name__)

VERSION = "1"
KEEP = 86400.0
"""Seconds that a request id outlives its job's record."""
MOST = 500_000
"""Of those; past that the oldest are forgotten early: some 300 bytes each."""
MAX_FILE = 256 << 20
"""Bytes of the file that are read: far more lines than that."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request id was used for: by this request, and the job, or the start that is under way."""

    fingerprint: bytes
    job: str | asyncio.Future[RunnerJob]


def request_key(user: str, request_id: str) -> bytes:
    """16 bytes for a user's request id."""
    parts = [text.encode("utf-8", "surrogatepass") for text in (user, request_id)]
    return hashlib.sha256(len(parts[0]).to_bytes(8, "little") + b"".join(parts)).digest()[:16]


class RequestIds:
    """All request ids that are known. `load` and `append` wait for the disk; everything else is memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[bytes, bytes] = {}
        self._starting: dict[bytes, Claim] = {}
        self._removed: deque[tuple[float, bytes]] = deque()

    def __repr__(self) -> str:
        return f"<RequestIds {len(self._known)}, {len(self._removed)} of removed jobs, {len(self._starting)} starting>"

    def find(self, key: bytes) -> Claim | None:
        self._expire()
        if key in self._starting:
            return self._starting[key]
        known = self._known.get(key)
        return Claim(known[6:], known[:6].hex()) if known else None

    def begin(self, key: bytes, fingerprint: str, start: asyncio.Future[RunnerJob]) -> None:
        """This start is under way; a job that came of it must be told by `remember`, as it is done."""
        self._starting[key] = Claim(bytes.fromhex(fingerprint)[:16], start)
        start.add_done_callback(lambda _: self._starting.pop(key, None))

    def remember(self, key: bytes, fingerprint: str, job_id: str) -> None:
        if key in self._known:  # of a removal that a crash has cut short: the job is there after all
            self._removed = deque(item for item in self._removed if item[1] != key)
        with contextlib.suppress(ValueError):  # a record of which the fingerprint is none
            self._known[key] = bytes.fromhex(job_id) + bytes.fromhex(fingerprint)[:16]

    def forget(self, key: bytes, job_id: str) -> None:
        """The job turned out never to have run."""
        if (known := self._known.get(key)) is not None and known[:6].hex() == job_id:
            del self._known[key]

    def outlive(self, keys: Iterable[bytes], now: float) -> None:
        """Their jobs are removed."""
        self._removed.extend((now, key) for key in keys)

    def append(self, keys: Iterable[bytes], now: float) -> None:
        """The same on disk. Raises OSError."""
        lines = [_line(key, known, now) for key in keys if (known := self._known.get(key)) is not None]
        if lines:
            append_durably(self.path, lines)

    def load(self) -> None:
        """Read the file; leave in it what is still of use. What is damaged in it is told and passed over.

        Raises OSError, and RecordError if it is no file of ours.
        """
        try:
            lines = read_file(self.path, MAX_FILE).split(b"\n")
        except FileNotFoundError:
            return
        now = time.time()
        parsed = [_parse(line) for line in lines if line]
        # A clock that was set back forgets nothing early: what was removed at a time to come was removed by now.
        good = [(key, known, min(removed, now)) for key, known, removed in filter(None, parsed) if removed > now - KEEP]
        if None in parsed:
            logger.error("cannot read %d lines of %s: they are damaged, and passed over", parsed.count(None), self.path)
        for key, known, removed in sorted(good, key=lambda line: line[2])[-MOST:]:
            self._known[key] = known
            self._removed.append((removed, key))
        if good != parsed:
            try:
                write_durably(self.path, b"".join(_line(*line) for line in good))
            except OSError as exc:  # a full disk must not keep a server from its jobs
                logger.error("cannot shorten %s: %s", self.path, exc.strerror)

    def _expire(self) -> None:
        last = time.time() - KEEP
        while self._removed and (self._removed[0][0] <= last or len(self._removed) > MOST):
            self._known.pop(self._removed.popleft()[1], None)


def _line(key: bytes, known: bytes, removed: float) -> bytes:
    text = f"{VERSION} {key.hex()} {known[:6].hex()} {known[6:].hex()} {removed:.3f}"
    return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()


def _parse(line: bytes) -> tuple[bytes, bytes, float] | None:
    text, _, checksum = line.rpartition(b" ")
    words = text.decode("ascii", "replace").split(" ")
    if len(words) != 5 or words[0] != VERSION or checksum != b"%08x" % zlib.crc32(text) or not is_job_id(words[2]):
        return None
    try:
        return bytes.fromhex(words[1]), bytes.fromhex(words[2]) + bytes.fromhex(words[3]), float(words[4])
    except ValueError:
        return None
