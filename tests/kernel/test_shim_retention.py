"""What the shim keeps of a log: never more than the limit, never moved; a job may be ended by its limit, or by a full disk."""

from __future__ import annotations

import array
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner import Gap, OutputPolicy
from jobrunner.output import Chunk, Selection
from jobrunner.shim.exitrecord import Cause, ExitRecord
from tests.support.shim import DATA, END, GAP, ShimJob, shim_job, wait_gone, wait_until
from tests.support.shimlog import ShimOwner, collect, kept_bytes, open_log
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root")

KIB, MIB = 1 << 10, 1 << 20
LIMITS = pytest.mark.parametrize("limit", [64 * KIB, MIB, 16 * MIB], ids=["64KiB", "1MiB", "16MiB"])
STOP = OutputPolicy.STOP
PAST_LIMIT, WRITE_ERROR = 1, 0

COUNT = """
import array, os, sys, time
position = 0
def count(size):
    global position
    view = memoryview(array.array("Q", range(position // 8, (position + size) // 8)).tobytes())
    while view: view = view[os.write(1, view):]
    position += size
def wait(path):
    while not os.path.exists(path): time.sleep(0.002)
"""
"""A job's `count(bytes)`: each 8 bytes are their own number, so that every part of the output says where it belongs."""


def counted(first: int, last: int) -> bytes:
    """What `count` writes at these offsets."""
    whole = array.array("Q", range(first // 8, -(-last // 8))).tobytes()
    return whole[first % 8 :][: last - first]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ShimJob]:
    with shim_job(tmp_path) as job:
        yield job


def start(job: ShimJob, code: str, limit: int, **changes: object) -> None:
    report = job.start(sys.executable, "-c", COUNT + code, output_limit=limit, **changes)
    assert report.started, report


def flood(job: ShimJob, limit: int, **changes: object) -> tuple[ExitRecord, list[int]]:
    """A job that writes eight times its limit, and samples of what was kept meanwhile."""
    start(job, f"for _ in range(64): count({limit // 8}); time.sleep(0.002)", limit, **changes)
    samples, owner = [], ShimOwner(job)
    while not owner.ended:
        samples.append(kept_bytes(job.log))
    return job.wait(), samples


@LIMITS
def test_what_is_kept_never_exceeds_the_limit_while_a_flood_runs(job: ShimJob, limit: int) -> None:
    end, samples = flood(job, limit)
    assert end.log_end == 8 * limit
    assert len(samples) > 30
    assert max(samples) <= limit
    assert kept_bytes(job.log) <= limit
    assert max(samples) > limit * 7 // 8 - 1024
    assert kept_bytes(job.log) > limit * 5 // 8, "and no more is dropped than has to be"


@LIMITS
def test_what_is_left_is_the_end_of_the_output_at_its_old_offsets(job: ShimJob, limit: int) -> None:
    end, _ = flood(job, limit)
    first = job.segments()[0]
    assert first > 0
    assert job.output() == counted(first, 8 * limit)
    last = job.records()[-1]
    assert (last.kind, last.end) == (END, 8 * limit)
    assert end.lost == 0, "what is dropped was written"


def test_an_index_that_is_larger_than_its_data_counts_too(job: ShimJob) -> None:
    start(job, "for _ in range(5000): os.write(1, b'o'); os.write(2, b'e'); time.sleep(0.0001)", 64 * KIB)
    most, owner = 0, ShimOwner(job)
    while not owner.ended:
        most = max(most, kept_bytes(job.log))
    end = job.wait()
    assert job.segments()[0] > 0, "it was more than the limit, mostly index"
    assert end.log_end == 10000
    assert 50 * KIB < most <= 64 * KIB
    assert kept_bytes(job.log) <= 64 * KIB


def test_a_limit_that_is_not_reached_drops_nothing(job: ShimJob) -> None:
    start(job, "count(60000)", 64 * KIB)
    assert job.wait().log_end == 60000
    assert job.output() == counted(0, 60000)


@LIMITS
async def test_a_reader_that_falls_behind_is_told_exactly_what_was_dropped_and_goes_on(job: ShimJob, limit: int) -> None:
    go = job.directory / "go"
    start(job, f"count(8000); wait({str(go)!r}); count({5 * limit})", limit)
    job.wait_output(counted(0, 8000))
    async with open_log(job) as log:
        reader = log.reader(Selection())
        first = await anext(reader)
        assert isinstance(first, Chunk)
        held = next(base for base in reversed(job.segments()) if base <= first.offset)
        go.touch()
        end = job.wait()
        assert not (job.log / f"{held:016x}").exists(), "the segment that it reads was dropped"
        parts = [first, *await collect(reader)]
    gaps = [part for part in parts if isinstance(part, Gap)]
    assert len(gaps) == 1
    assert gaps[0].reason == "dropped"
    assert gaps[0].last == job.segments()[0] - 1
    assert gaps[0].first > 8000, "the rest of the segment that it had open is not missing"
    position = 0
    for part in parts:
        if isinstance(part, Gap):
            assert part.first == position
            position = part.last + 1
        else:
            assert part.offset == position
            assert part.data == counted(position, part.next_offset)
            position = part.next_offset
    assert position == end.log_end == 8000 + 5 * limit
    assert reader.end is not None and reader.end.total_bytes == position


# -- the policy `stop`


@LIMITS
def test_output_past_the_limit_ends_the_job(job: ShimJob, limit: int) -> None:
    start(job, f"while True: count({limit // 4})", limit, output_policy=STOP, grace=5.0)
    end = job.wait(10)
    assert (end.cause, end.wait_status) == (Cause.OUTPUT_LIMIT, signal.SIGTERM)
    kept = job.output()
    assert kept == counted(0, len(kept))
    assert limit - 64 < kept_bytes(job.log) <= limit
    records = job.records()
    assert [record.kind for record in records[-2:]] == [GAP, END]
    gap, last = records[-2:]
    assert (gap.stream, gap.end) == (PAST_LIMIT, end.log_end)
    assert gap.lost == end.lost == end.log_end - len(kept)
    assert last.end == end.log_end


async def test_a_follower_is_told_why_the_rest_is_missing(job: ShimJob) -> None:
    start(job, "while True: count(16384)", 64 * KIB, output_policy=STOP)
    async with open_log(job) as log:
        parts = await collect(reader := log.reader(Selection()))
    end = job.wait()
    kept = len(job.output())
    assert parts[-1] == Gap(kept, end.log_end - 1, "output_limit")
    assert b"".join(part.data for part in parts[:-1] if isinstance(part, Chunk)) == counted(0, kept)
    assert reader.end is not None and reader.end.total_bytes == end.log_end


def test_a_job_that_ignores_the_signal_is_killed_after_the_grace_period(job: ShimJob) -> None:
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: count(16384)"
    start(job, code, 64 * KIB, output_policy=STOP, grace=0.5)
    end = job.wait(10)
    assert (end.cause, end.wait_status) == (Cause.OUTPUT_LIMIT, signal.SIGKILL)
    assert 500_000_000 <= end.wall_ns < at_most(3) * 1e9
    assert kept_bytes(job.log) <= 64 * KIB


def test_what_a_job_says_in_its_grace_period_is_counted(job: ShimJob) -> None:
    code = (
        "import signal\n"
        "def leave(*_): os.write(2, b'last words'); sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, leave)\ncount(80000)\nwhile True: time.sleep(1)"
    )
    start(job, code, 64 * KIB, output_policy=STOP)
    end = job.wait(10)
    assert (end.cause, end.wait_status) == (Cause.OUTPUT_LIMIT, 3 << 8)
    assert end.log_end == 80000 + len(b"last words")
    assert end.log_end == end.lost + len(job.output())


def test_a_job_within_its_limit_ends_by_itself(job: ShimJob) -> None:
    start(job, "count(60000); sys.exit(4)", 64 * KIB, output_policy=STOP)
    end = job.wait()
    assert (end.cause, end.wait_status, end.lost) == (Cause.OWN, 4 << 8, 0)


# -- a disk that is full


@pytest.fixture
def small(tmp_path: Path) -> Iterator[ShimJob]:
    """A job whose log is on a file system of 1 MiB."""
    with shim_job(tmp_path) as job:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(job.log)], check=True)
        try:
            yield job
        finally:
            job.clean()
            subprocess.run(["umount", "-l", str(job.log)], check=True)


def test_a_write_error_ends_the_job_where_that_is_the_policy(small: ShimJob) -> None:
    start(small, "count(4000000)\nwhile True: time.sleep(1)", 16 * MIB, on_write_error="stop", grace=5.0)
    before = time.monotonic()
    end = small.wait(10)
    assert (end.cause, end.wait_status) == (Cause.LOG_ERROR, signal.SIGTERM)
    assert time.monotonic() - before < at_most(4)
    kept = small.output()
    assert kept == counted(0, len(kept))
    assert 500_000 < len(kept) < MIB
    assert len(kept) + end.lost == end.log_end <= 4_000_000
    assert small.left() == []


def test_a_write_error_kills_a_job_that_ignores_the_signal(small: ShimJob) -> None:
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: count(65536)"
    start(small, code, 16 * MIB, on_write_error="stop", grace=0.3)
    pids = small.processes()
    end = small.wait(10)
    assert (end.cause, end.wait_status) == (Cause.LOG_ERROR, signal.SIGKILL)
    wait_gone(pids)


async def test_the_log_goes_on_after_a_gap_when_there_is_room_again(small: ShimJob) -> None:
    ballast, full, go = small.log / ".ballast", small.directory / "full", small.directory / "go"
    ballast.write_bytes(b"x" * 600_000)
    code = f"count(2000000); open({str(full)!r}, 'w'); wait({str(go)!r}); time.sleep(0.05); count(80000)"
    start(small, code, 16 * MIB)
    async with open_log(small) as log:
        reader = log.reader(Selection())
        before = [await anext(reader)]
        wait_until(full.exists)
        ballast.unlink()
        go.touch()
        parts = [*before, *await collect(reader)]
    end = small.wait()
    gaps = [part for part in parts if isinstance(part, Gap)]
    assert [gap.reason for gap in gaps] == ["write_error"]
    assert gaps[0].last - gaps[0].first + 1 == end.lost
    assert gaps[0].last < 2_000_000, "all that was written after that is there"
    assert all(part.data == counted(part.offset, part.next_offset) for part in parts if isinstance(part, Chunk))
    assert sum(len(part.data) for part in parts if isinstance(part, Chunk)) + end.lost == 2_080_000
    assert reader.end is not None and reader.end.total_bytes == end.log_end == 2_080_000


async def test_a_disk_that_stays_full_still_gives_every_reader_an_end_and_the_total(small: ShimJob) -> None:
    start(small, "count(3000000)", 16 * MIB)
    end = small.wait()
    assert END not in {record.kind for record in small.records()}, "no record of the end has found a place"
    kept = len(small.output())
    async with open_log(small) as log:
        for offset in (0, kept, kept + 1):
            parts = await collect(reader := log.reader(Selection(offset=offset)))
            assert parts[-1] == Gap(max(offset, kept), end.log_end - 1, "write_error")
            assert reader.end is not None and reader.end.total_bytes == end.log_end == 3_000_000


def test_what_could_not_be_indexed_takes_up_no_room(small: ShimJob) -> None:
    start(small, "count(3000000)", 16 * MIB)
    small.wait()
    for base in small.segments():
        ends = [record.end for record in small.records() if record.base == base and record.kind == DATA]
        assert (small.log / f"{base:016x}").stat().st_size == (ends[-1] - base if ends else 0)
        assert (small.log / f"{base:016x}.idx").stat().st_size % 32 == 0


# -- the item list


@pytest.mark.parametrize(
    "changes", [{"output_limit": 65535}, {"output_policy": "drop"}, {"output_policy": ""}, {"on_write_error": "retry"}]
)
def test_a_limit_or_policy_that_is_none_is_refused(job: ShimJob, changes: dict[str, object]) -> None:
    report = job.start("true", **changes)
    assert (report.started, report.step) == (False, "args")
    assert next(iter(changes)).replace("_", "-") in report.detail
