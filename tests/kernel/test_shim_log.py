"""Output: every byte of both streams, in the order of the reads, told when it is lost, and never a reason to hold up the job."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner.shim.exitrecord import Cause
from tests.support.shim import DATA, END, GAP, STDERR, STDOUT, ShimJob, shim_job, wait_gone, wait_until
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root")

MIB = 1 << 20


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ShimJob]:
    with shim_job(tmp_path) as job:
        yield job


def python(code: str) -> tuple[str, str, str]:
    return (sys.executable, "-c", code)


def check_index(job: ShimJob, segment_bytes: int = 16 * MIB) -> None:
    """What docs/formats.md says of every log that has lost nothing."""
    records = job.records()
    position = 0
    for number, record in enumerate(records):
        last = number == len(records) - 1
        assert record.kind == (END if last else DATA)
        assert (record.stream == 0) == last
        assert record.lost == 0
        assert record.end == position if last else record.end > position
        assert record.base <= position
        assert record.time_ns > 0
        if number and record.base != records[number - 1].base:
            assert record.base == position, "a segment is named by the end of the one before"
            files = (job.log / f"{records[number - 1].base:016x}", job.log / f"{records[number - 1].base:016x}.idx")
            assert sum(file.stat().st_size for file in files) >= segment_bytes, "and begun when that one was full"
        position = record.end
    for base, following in zip(job.segments(), [*job.segments()[1:], position], strict=True):
        assert (job.log / f"{base:016x}").stat().st_size == following - base
    assert job.record().log_end == position
    whole = b"".join((job.log / f"{base:016x}").read_bytes() for base in job.segments())
    assert whole == job.output(), "`cat` of the segments is the output"


def test_both_streams_are_kept_byte_for_byte(job: ShimJob) -> None:
    code = (
        "import hashlib, os, random\n"
        "rng = random.Random(7); sums = [hashlib.sha256(), hashlib.sha256()]\n"
        "for _ in range(1500):\n"
        "    which = rng.randrange(2); part = rng.randbytes(rng.choice([1, 10, 4095, 4096, 70000]))\n"
        "    sums[which].update(part); view = memoryview(part)\n"
        "    while view: view = view[os.write(which + 1, view):]\n"
        f"open('{job.directory}/sums', 'w').write(' '.join(s.hexdigest() for s in sums))\n"
    )
    job.start(*python(code))
    assert job.wait(40).wait_status == 0
    found = [hashlib.sha256(job.output(stream)).hexdigest() for stream in (STDOUT, STDERR)]
    assert found == (job.directory / "sums").read_text().split()
    check_index(job)


def test_a_million_one_byte_writes_are_whole_and_cheap_to_index(job: ShimJob) -> None:
    job.start(*python("import os\nw = os.write\nfor i in range(10**6): w(1, b'%d' % (i % 10))"))
    end = job.wait(50)
    assert job.output() == b"0123456789" * 100_000
    assert len(job.records()) < 20 * (end.wall_ns / 1e6) + 10
    assert len(job.records()) * 32 < 4 * MIB
    check_index(job)


TURNS = """
import fcntl, os, struct, termios
def left(fd): return struct.unpack('i', fcntl.ioctl(fd, termios.FIONREAD, b'    '))[0]
for i in range(400):
    fd = 1 + i // 3 % 2
    os.write(fd, b'%d\\n' % i)
    if i % 3 == 2:
        while left(fd): pass
"""


def test_streams_that_take_turns_keep_their_order_while_the_shim_keeps_up(job: ShimJob) -> None:
    """The job goes on with the other stream when what it wrote has been read, which is what keeping up means."""
    job.start(*python(TURNS))
    assert job.wait(40).wait_status == 0
    assert job.output() == b"".join(b"%d\n" % i for i in range(400))


def test_turns_of_two_streams_are_bounded_in_the_index(job: ShimJob) -> None:
    job.start(*python("import os\nfor i in range(200000): os.write(1 + i % 2, b'x')"))
    end = job.wait(40)
    assert len(job.records()) < 25 * (end.wall_ns / 1e6) + 10
    check_index(job)


def test_merged_output_is_one_stream_in_exactly_the_jobs_order(job: ShimJob) -> None:
    job.start(*python("import os\nfor i in range(50000): os.write(1 + i % 2, b'%d\\n' % i)"), merge=True)
    job.wait(40)
    assert job.output() == b"".join(b"%d\n" % i for i in range(50000))
    assert {record.stream for record in job.records() if record.kind == DATA} == {STDOUT}


def test_what_comes_after_silence_is_recorded_at_once(job: ShimJob) -> None:
    """Not with what comes within the millisecond after it. A busy host wakes a shim late; one of many records is in time."""
    job.start(*python("import os, time\nwhile True: os.write(1, b'%020d\\n' % time.time_ns()); time.sleep(0.03)"))

    def delays() -> list[int]:
        data = job.output()
        return [record.time_ns - int(data[record.end - 21 : record.end]) for record in job.records() if record.end <= len(data)]

    wait_until(lambda: any(delay < 900_000 for delay in delays()), at_most(20))
    assert min(delays()) > 0
    job.stop(grace=0)
    job.wait()


def test_segments_follow_one_another_without_a_gap(job: ShimJob) -> None:
    job.shell("head -c 3000000 /dev/urandom & head -c 1000000 /dev/urandom >&2; wait", segment_bytes=100_000)
    assert job.wait().log_end == 4_000_000
    assert len(job.segments()) > 10
    check_index(job, 100_000)


def test_a_segment_may_be_of_one_byte(job: ShimJob) -> None:
    job.shell(f"for i in 1 2 3; do echo $i; while ! [ -e {job.directory}/$i ]; do sleep 0.01; done; done", segment_bytes=1)
    for number in (1, 2, 3):
        job.wait_output(b"%d\n" % number)
        (job.directory / str(number)).touch()
    job.wait()
    assert job.output() == b"1\n2\n3\n"
    assert job.segments() == [0, 2, 4]


@pytest.mark.parametrize("more", [b"", b"x"])
def test_a_segment_that_is_exactly_full_has_the_end_or_the_next_begins(job: ShimJob, more: bytes) -> None:
    full = 4096 - 32
    seen = job.directory / "seen"
    wait = f"while not os.path.exists({str(seen)!r}): time.sleep(0.01)"
    job.start(*python(f"import os, time\nos.write(1, bytes({full}))\n{wait}\nos.write(1, {more!r})"), segment_bytes=4096)
    job.wait_output(bytes(full))
    seen.touch()
    job.wait()
    assert job.segments() == [0, full][: 1 + len(more)]
    assert job.output() == bytes(full) + more
    check_index(job, 4096)


def test_nothing_and_nul_are_what_they_are(job: ShimJob) -> None:
    code = "import os, time\nfor data in (b'', b'\\0', b'', b'\\0\\0\\n', b''): os.write(1, data); time.sleep(0.003)"
    job.start(*python(code))
    job.wait()
    assert job.output() == b"\0\0\0\n"
    check_index(job)


def test_the_last_bytes_before_the_end_are_kept(tmp_path: Path) -> None:
    for size in (1, 4096, 65536, 200_000):
        with shim_job(tmp_path) as job:
            job.shell(f"head -c {size} /dev/zero")
            assert job.wait().log_end == size
            assert job.output() == b"\0" * size


def test_no_output_is_a_log_of_one_end(job: ShimJob) -> None:
    job.run("true")
    assert [(record.kind, record.end) for record in job.records()] == [(END, 0)]


@pytest.mark.parametrize("close", ["exec >&-", "exec 2>&-", "exec >&- 2>&-"])
def test_a_job_that_closes_its_output_does_not_make_the_shim_spin(job: ShimJob, close: str) -> None:
    job.shell(f"echo before; {close}; exec sleep 100")
    job.wait_output(b"before")
    stat = Path(f"/proc/{job.shim()}/stat")
    time.sleep(0.1)
    before = ticks(stat)
    time.sleep(0.5)
    assert ticks(stat) - before <= 1
    job.stop(grace=60)
    assert job.wait().wait_status == signal.SIGTERM


def ticks(stat: Path) -> int:
    fields = stat.read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_one_stream_goes_on_when_the_other_is_closed(job: ShimJob) -> None:
    job.run("exec >&-; sleep 0.05; echo later >&2")
    assert job.output(STDERR) == b"later\n"


STRANGER = """
import array, os, socket, sys, time
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
s.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1]))])
s.recv(1)
os.write(1, b'last words')
"""


@pytest.mark.parametrize("flood", [False, True])
def test_a_stranger_that_holds_a_pipe_does_not_hold_up_the_end(job: ShimJob, flood: bool) -> None:
    """A process outside, which was handed the job's stdout, keeps it open and even writes to it without end."""
    path = str(job.directory / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        job.start(*python(STRANGER), path)
        connection, _ = listening.accept()
        with connection:
            _, (handed,), _, _ = socket.recv_fds(connection, 1, 1)
            writer = subprocess.Popen(["yes"], stdout=handed) if flood else None
            try:
                connection.send(b"x")
                end = job.wait(5)
            finally:
                if writer is not None:
                    writer.kill()
                    writer.wait()
                os.close(handed)
    assert (end.cause, end.wait_status) == (Cause.OWN, 0)
    assert b"last words" in job.output()


def test_a_job_that_makes_its_own_pipe_small_or_packeted_loses_nothing(job: ShimJob) -> None:
    code = (
        "import fcntl, os\n"
        "fcntl.fcntl(1, 1031, 4096); fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_DIRECT)\n"
        "for i in range(500): os.write(1, b'%d\\n' % i)"
    )
    job.start(*python(code))
    job.wait()
    assert job.output() == b"".join(b"%d\n" % i for i in range(500))


def test_stdout_can_be_opened_by_its_path_and_does_not_block_by_itself(job: ShimJob) -> None:
    end = job.run("echo a > /dev/stdout; echo b > /dev/stderr; grep flags /proc/self/fdinfo/1")
    assert end.wait_status == 0
    assert job.output(STDERR) == b"b\n"
    flags = int(job.output(STDOUT).split(b"flags:")[1], 8)
    assert not flags & os.O_NONBLOCK


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


def test_a_full_disk_costs_bytes_that_are_counted_and_never_the_job(small: ShimJob) -> None:
    small.shell("head -c 5000000 /dev/zero; echo; echo done >&2; exit 4")
    end = small.wait()
    assert (end.cause, end.wait_status, end.log_end) == (Cause.OWN, 4 << 8, 5_000_006)
    kept = sum(len(small.output(stream)) for stream in (STDOUT, STDERR))
    assert 500_000 < kept < MIB
    assert kept + end.lost == end.log_end


def test_when_there_is_room_again_the_log_goes_on_and_tells_the_gap(small: ShimJob) -> None:
    ballast = small.log / ".ballast"
    ballast.write_bytes(b"x" * 600_000)
    full, go, seen = (small.directory / name for name in ("full", "go", "seen"))
    small.shell(
        f"echo first; head -c 2000000 /dev/zero; touch {full}; "
        f"while ! [ -e {go} ]; do sleep 0.01; done; while ! [ -e {seen} ]; do echo last; sleep 0.01; done; echo words"
    )
    wait_until(full.exists)
    ballast.unlink()
    go.touch()
    small.wait_output(b"last\n")
    seen.touch()
    end = small.wait()
    records = small.records()
    gaps = [record for record in records if record.kind == GAP]
    assert len(gaps) == 1
    assert gaps[0].end == gaps[0].base, "the first record of a segment that is named by the offset after the gap"
    before = max(record.end for record in records if record.base < gaps[0].base)
    assert gaps[0].lost == gaps[0].end - before == end.lost
    assert small.output().endswith(b"last\nwords\n")
    assert records[-1].kind == END
    assert records[-1].end == end.log_end == len(small.output()) + end.lost


def test_no_segment_stays_that_does_not_tell_its_gap(small: ShimJob) -> None:
    """A reader would wait in it for ever."""
    small.shell("for i in $(seq 40); do head -c 100000 /dev/zero; sleep 0.015; done")
    small.wait()
    firsts = {base: next((record for record in small.records() if record.base == base), None) for base in small.segments()[1:]}
    assert all(first is not None and first.kind == GAP for first in firsts.values())


def test_an_index_record_that_fits_in_part_is_taken_back_and_what_it_told_is_lost(job: ShimJob) -> None:
    """A limit of file sizes cuts a write short at any byte, as a disk may that is full."""
    go = job.directory / "go"
    job.shell(f"while ! [ -e {go} ]; do sleep 0.01; done; for i in $(seq 60); do printf $i,; sleep 0.002; done")
    most = 20 * 32 + 17
    resource.prlimit(job.shim(), resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    go.touch()
    end = job.wait()
    gaps = [record for record in job.records() if record.kind == GAP]
    assert gaps, "no index has come to its limit"
    assert sum(record.lost for record in gaps) == end.lost
    assert len(job.output()) + end.lost == end.log_end == len("".join(f"{number}," for number in range(1, 61)))
    for base in job.segments():
        rest = (job.log / f"{base:016x}.idx").stat().st_size % 32
        assert rest == 0 or base == job.segments()[-1], "part of a record stands in the index, and it is not the end's"
        covered = [record.end for record in job.records() if record.base == base]
        assert (job.log / f"{base:016x}").stat().st_size == covered[-1] - base


def test_a_stop_works_on_a_full_disk(small: ShimJob) -> None:
    small.shell("head -c 5000000 /dev/zero; sleep 100")
    job_pids = small.processes()
    wait_until(lambda: os.statvfs(small.log).f_bavail == 0)
    small.stop()
    assert small.wait(5).cause is Cause.STOPPED
    wait_gone(job_pids)


def test_the_record_survives_a_directory_that_is_full(tmp_path: Path) -> None:
    target = tmp_path / "full"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(target)], check=True)
    try:
        with shim_job(target) as job:
            job.shell(f"head -c 1000000 /dev/zero; dd if=/dev/zero of={target}/rest bs=4096 2>/dev/null; exit 9")
            end = job.wait()
            assert (end.cause, end.wait_status, end.log_end) == (Cause.OWN, 9 << 8, 1_000_000)
            assert end.lost > 700_000
    finally:
        # The hang-up of `ctl` comes while the shim still has its directory: a lazy umount waits for nobody.
        subprocess.run(["umount", "-l", str(target)], check=True)
