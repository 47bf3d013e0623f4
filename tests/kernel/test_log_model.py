"""The log as a whole against plain bytes: the shipped shim writes, the shipped reader reads, and every lost byte is told."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobrunner import Gap, Stream
from jobrunner.output import Chunk, Selection
from tests.support.shim import ShimJob, shim_job
from tests.support.shimlog import collect, kept_bytes, open_log
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

LIMIT = 64 << 10
JOB = """
import fcntl, json, os, random, struct, sys, termios, time
def left(fd): return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
for number, (what, size) in enumerate(json.loads(sys.argv[1])):
    if what == "fill":
        with open(sys.argv[2], "wb", 0) as ballast:
            try:
                while ballast.write(bytes(4096)): pass
            except OSError: pass
    elif what == "free":
        if os.path.exists(sys.argv[2]): os.unlink(sys.argv[2])
        time.sleep(0.012)
    else:
        view = memoryview(random.Random(number).randbytes(size))
        while view: view = view[os.write(1 if what == "stdout" else 2, view):]
        while left(1) or left(2): time.sleep(0.0002)
"""
"""Writes one thing after the other: each only when the shim has read all of the one before, so that the order is known."""


@dataclass(frozen=True)
class Model:
    """What the job wrote: each byte with its stream."""

    data: bytes
    streams: tuple[Stream, ...]

    @classmethod
    def of(cls, writes: Sequence[tuple[str, int]]) -> Model:
        parts = [
            (what, random.Random(number).randbytes(size)) for number, (what, size) in enumerate(writes) if what in tuple(Stream)
        ]
        streams = [Stream(what) for what, part in parts for _ in part]
        return cls(b"".join(part for _, part in parts), tuple(streams))

    def check(self, parts: list[Chunk | Gap], start: int, wanted: frozenset[Stream]) -> int:
        """Each byte from `start` on that is wanted is given once, in order, as it was, or is in a gap. How many are in gaps."""
        position, missing = start, 0
        for part in parts:
            first = part.first if isinstance(part, Gap) else part.offset
            assert position <= first
            assert not wanted & set(self.streams[position:first]), "something was passed over without a word"
            if isinstance(part, Gap):
                assert part.first <= part.last
                position = part.last + 1
                missing += position - first
            else:
                position = part.next_offset
                assert part.data == self.data[first:position]
                assert {part.stream} == set(self.streams[first:position])
        assert position <= len(self.data)
        assert not wanted & set(self.streams[position:])
        return missing


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 512 KiB, so that filling it is quick."""
    path = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


SIZES = st.one_of(st.integers(1, 200), st.integers(1, 9000), st.integers(1, 40_000))
WRITE = st.tuples(st.sampled_from(tuple(Stream)), SIZES)
DISK = st.sampled_from([("fill", 0), ("free", 0)])
WANTED = st.sampled_from([frozenset(Stream), frozenset({Stream.STDOUT}), frozenset({Stream.STDERR})])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    writes=st.lists(st.one_of(WRITE, WRITE, WRITE, WRITE, DISK), max_size=25),
    pause=st.integers(0, 6),
    late=st.floats(0, 1),
    wanted=WANTED,
)
def test_any_interleaving_of_writes_and_a_full_disk_equals_the_bytes(
    small_disk: Path, writes: list[tuple[str, int]], pause: int, late: float, wanted: frozenset[Stream]
) -> None:
    """A follower that stalls after some parts until the job has ended, and a late reader of any streams from any offset."""
    model = Model.of(writes)
    start = int(len(model.data) * late)
    with shim_job(small_disk) as job:
        try:
            following, late_parts, total = asyncio.run(run(job, writes, pause, Selection(offset=start, streams=wanted)))
            end, kept = job.record(), kept_bytes(job.log)
        finally:
            job.clean()
            (small_disk / "ballast").unlink(missing_ok=True)
            shutil.rmtree(job.directory)
    assert total == end.log_end == len(model.data)
    assert kept <= LIMIT
    missing = model.check(following, 0, frozenset(Stream))
    model.check(late_parts, start, wanted)
    errors = [part for part in following if isinstance(part, Gap) and part.reason == "write_error"]
    assert sum(part.last - part.first + 1 for part in errors) <= end.lost <= missing, "what was lost may have been dropped since"
    if not any(what == "fill" for what, _ in writes):
        assert end.lost == 0
        assert missing == 0 or len(model.data) > LIMIT * 5 // 8, "nothing is dropped that has a place"


async def run(
    job: ShimJob, writes: list[tuple[str, int]], pause: int, late: Selection
) -> tuple[list[Chunk | Gap], list[Chunk | Gap], int]:
    """The job, to its end: what the follower was given, what the late reader was given, and the total that both were told."""
    ballast = str(job.directory.parent / "ballast")
    report = job.start(sys.executable, "-c", JOB, json.dumps(writes), ballast, output_limit=LIMIT)
    assert report.started, report
    parts: list[Chunk | Gap] = []
    async with open_log(job) as log:
        follower, last = log.reader(Selection()), log.reader(late)
        with fail_after(10):
            while len(parts) < pause and (part := await anext(follower, None)) is not None:
                parts.append(part)
            await log.owner.wait()
        parts += await collect(follower)
        late_parts = await collect(last)
    assert follower.end is not None and last.end is not None
    assert follower.end.total_bytes == last.end.total_bytes
    return parts, late_parts, follower.end.total_bytes
