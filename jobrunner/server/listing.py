"""One page of the list of jobs: newest first, filtered, bounded in number and in bytes."""

from __future__ import annotations

import asyncio
import base64
import json

from jobrunner.errors import InvalidRequest, JobNotFound
from jobrunner.job import JobStatus
from jobrunner.kept import Entry, Position
from jobrunner.runner import JobRunner
from jobrunner.wire import messages as pb
from jobrunner.wire.convert import info_to_wire
from jobrunner.wire.encode import Encoded
from jobrunner.wire.write import varint, written

__all__ = ["page"]

DEFAULT_PAGE = 100
MAX_PAGE = 1000
MAX_BYTES = 1 << 20
MAX_CURSOR = 256
"""Of one page, and one job more: clients take messages of 4 MiB."""
JOBS = b"\x0a"
NEXT_CURSOR = b"\x12"

SCAN = 500
"""Jobs that are passed over without a pause."""


async def page(runner: JobRunner, request: pb.JobListRequest) -> Encoded:
    """The JobListResponse after the request's cursor. Raises InvalidRequest that names the field.

    Waits until all jobs are known. Encoded job by job, with a pause after each, because a full page would hold up the loop.
    """
    size = _size(request.page_size)
    after = _read_cursor(request.cursor) if request.cursor else None
    statuses = {_status(word) for word in request.statuses}
    parts: list[bytes] = []
    length = 0
    last: Position | None = None
    await runner.loaded()
    for number, entry in enumerate(runner.catalog.jobs.newest_first(after)):
        if number % SCAN == SCAN - 1:
            await asyncio.sleep(0)
        if not _wanted(entry, statuses, request):
            continue
        if last is not None and (len(parts) == size or length >= MAX_BYTES):
            parts.append(_field(NEXT_CURSOR, _write_cursor(last).encode()))
            break
        position = (entry.created, entry.job_id)
        try:
            info = (await runner.get(entry.job_id)).info()
        except JobNotFound:  # removed meanwhile
            continue
        if any(info.labels.get(name) != value for name, value in request.labels.items()):
            continue
        parts.append(_field(JOBS, written(info_to_wire(info))))
        length += len(parts[-1])
        last = position
        await asyncio.sleep(0)
    return Encoded(b"".join(parts))


def _size(asked: int) -> int:
    if asked > MAX_PAGE:
        raise InvalidRequest("page_size", f"{asked} is more than {MAX_PAGE}", verb="list jobs")
    return asked or DEFAULT_PAGE


def _status(word: str) -> JobStatus:
    if word not in list(JobStatus):
        raise InvalidRequest("statuses", f"{word!r} is none of {', '.join(JobStatus)}", verb="list jobs")
    return JobStatus(word)


def _wanted(entry: Entry, statuses: set[JobStatus], request: pb.JobListRequest) -> bool:
    if statuses and entry.status not in statuses:
        return False
    if request.name and entry.name != request.name:
        return False
    return entry.may_have(request.labels)


def _field(tag: bytes, payload: bytes) -> bytes:
    return tag + varint(len(payload)) + payload


def _write_cursor(position: Position) -> str:
    """Where a page ended: the next begins after it, whatever was removed or started in between."""
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode()


def _read_cursor(cursor: str) -> Position:
    try:
        if len(cursor) > MAX_CURSOR:
            raise ValueError("too long")
        created, job_id = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        return float(created), str(job_id)
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise InvalidRequest("cursor", "it is not from an answer of this server", verb="list jobs") from exc
