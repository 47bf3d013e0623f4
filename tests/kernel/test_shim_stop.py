"""Stops: the shim alone signals, escalates and says why; the server only asks."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner.shim.exitrecord import Cause, State
from jobrunner.shim.stopfile import StopRequest, pack_stop, parse_stop
from tests.support.shim import ShimJob, read_proc, shim_job, status_field, traced, wait_until
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root")

DEAF = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ShimJob]:
    with shim_job(tmp_path) as job:
        yield job


def test_a_stop_signals_the_command_and_returns_as_soon_as_it_is_gone(job: ShimJob) -> None:
    job.start("sleep", "100")
    before = time.monotonic()
    job.stop(grace=60)
    end = job.wait()
    assert time.monotonic() - before < at_most(10)
    assert (end.cause, end.wait_status) == (Cause.STOPPED, signal.SIGTERM)


def test_a_command_that_ignores_the_signal_is_killed_after_the_grace_period(job: ShimJob) -> None:
    job.shell(DEAF)
    job.wait_output(b"ready")
    before = time.monotonic()
    job.stop(grace=0.4)
    end = job.wait()
    assert 0.4 <= time.monotonic() - before < at_most(5)
    assert (end.cause, end.wait_status) == (Cause.STOPPED, signal.SIGKILL)
    assert job.left() == []


def test_a_command_may_end_in_its_own_way_within_the_grace_period(job: ShimJob) -> None:
    job.shell("trap 'echo cleaned; exit 7' TERM; echo ready; while :; do sleep 0.02; done")
    job.wait_output(b"ready")
    job.stop()
    end = job.wait()
    assert (end.cause, end.wait_status) == (Cause.STOPPED, 7 << 8)
    assert job.output() == b"ready\ncleaned\n"


def test_the_signal_is_the_one_that_was_asked_for(job: ShimJob) -> None:
    job.shell("trap 'exit 1' TERM; trap 'exit 5' USR1; echo ready; while :; do sleep 0.02; done")
    job.wait_output(b"ready")
    job.stop(signal=signal.SIGUSR1)
    assert job.wait().wait_status == 5 << 8


def test_a_stopped_command_is_continued_so_that_it_takes_the_signal(job: ShimJob) -> None:
    job.shell("trap 'exit 6' TERM; echo ready; kill -STOP $$; while :; do sleep 0.02; done")
    job.wait_output(b"ready")
    wait_until(lambda: b") T " in b"".join(read_proc(pid, "stat") for pid in job.processes()))
    job.stop(grace=30)
    assert job.wait(5).wait_status == 6 << 8


def test_no_grace_kills_at_once(job: ShimJob) -> None:
    job.shell("trap 'echo not reached' TERM; echo ready; while :; do sleep 0.02; done")
    job.wait_output(b"ready")
    job.stop(grace=0)
    end = job.wait(5)
    assert (end.cause, end.wait_status) == (Cause.STOPPED, signal.SIGKILL)


def test_the_kill_lifts_the_limits_of_all_disks_however_many_there_are(job: ShimJob, tmp_path: Path) -> None:
    """By a plain file in the place of io.max, which gets the orders one after the other."""
    limits = tmp_path / "io.max"
    limits.write_text("".join(f"7:{number} rbps=100000000 wbps=100000000 riops=max wiops=max\n" for number in range(200)))
    job.start("sleep", "100", cgroup_items=[("io-limit", str(limits))])
    job.stop(grace=0)
    job.wait(5)
    orders = limits.read_text().split("rbps=max wbps=max riops=max wiops=max")
    assert orders[:200] == [f"7:{number} " for number in range(200)]


def test_a_later_stop_may_bring_the_kill_nearer(job: ShimJob) -> None:
    job.shell("trap 'echo term' TERM; echo ready; while :; do sleep 0.02; done")
    job.wait_output(b"ready")
    job.stop(grace=60)
    job.wait_output(b"term")
    before = time.monotonic()
    job.stop(grace=0.3)
    job.wait()
    assert 0.3 <= time.monotonic() - before < at_most(10)


def test_a_later_stop_does_not_put_the_kill_off(job: ShimJob) -> None:
    job.shell("trap 'echo term' TERM; echo ready; while :; do sleep 0.02; done")
    job.wait_output(b"ready")
    job.stop(grace=0.5)
    job.wait_output(b"term")
    job.stop(grace=60)
    job.wait(10)
    assert job.output().count(b"term") == 1, "and sends no second signal"


def test_a_shutdown_is_told_as_such(job: ShimJob) -> None:
    job.start("sleep", "100")
    job.stop(reason="shutdown")
    assert job.wait().cause is Cause.SHUTDOWN


def test_a_stop_that_was_asked_for_before_the_start_holds(job: ShimJob) -> None:
    job.write_stop(grace=60)
    assert job.start("sleep", "100").started
    assert job.wait(5).cause is Cause.STOPPED


def test_a_stop_file_alone_is_not_looked_at(job: ShimJob) -> None:
    """The line on `ctl` is what asks; a server writes the file first, so that the order is never the other way round."""
    job.shell("echo ready; sleep 0.3")
    job.wait_output(b"ready")
    job.write_stop(grace=0)
    assert job.wait().cause is Cause.OWN


@pytest.mark.parametrize("raw", [None, b"", b"garbage", b"jobrunner-stop=2\0reason=stopped\0", b"jobrunner-stop=1\0new-key=1\0"])
def test_a_stop_that_cannot_be_read_is_the_jobs_own_signal_and_grace(job: ShimJob, raw: bytes | None) -> None:
    job.shell("trap 'exit 5' INT; echo ready; while :; do sleep 0.02; done", stop_signal=signal.SIGINT)
    job.wait_output(b"ready")
    if raw is not None:
        (job.directory / "stop").write_bytes(raw)
    job.say(b"stop\n")
    end = job.wait(5)
    assert (end.cause, end.wait_status) == (Cause.STOPPED, 5 << 8)


def test_lines_that_are_not_known_are_ignored_and_parts_of_lines_are_put_together(job: ShimJob) -> None:
    job.shell("echo ready; sleep 100")
    job.wait_output(b"ready")  # the shim has looked for a stop of before the start
    job.write_stop(grace=60)
    for part in (b"hello\n", b"\n", b"stopp\n", b" stop\n", b"x" * 3000 + b"\n", b"\0stop\n", b"st"):
        job.say(part)
    time.sleep(0.1)
    assert job.record().state is State.RUNNING
    job.say(b"op\n")
    assert job.wait(5).cause is Cause.STOPPED


def test_servers_that_come_and_go_do_not_make_the_shim_spin(job: ShimJob) -> None:
    job.start("sleep", "100")
    for _ in range(50):
        job.say(b"hello\n")
    stat = f"/proc/{job.shim()}/stat"
    before = cpu_ticks(stat)
    time.sleep(0.5)
    assert cpu_ticks(stat) - before <= 2


def cpu_ticks(stat: str) -> int:
    fields = Path(stat).read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_a_stop_of_a_command_that_has_ended_by_itself_is_not_the_reason(tmp_path: Path) -> None:
    """Whichever came first is told; both are true endings, and never a mixture of the two."""
    causes = set()
    for number in range(40):
        with shim_job(tmp_path) as job:
            job.shell("sleep 0.03; exit 9")
            job.write_stop(grace=60)
            time.sleep(number * 0.001)
            job.say(b"stop\n")
            end = job.wait()
            assert (end.cause, end.wait_status) in [(Cause.OWN, 9 << 8), (Cause.STOPPED, signal.SIGTERM), (Cause.STOPPED, 9 << 8)]
            causes.add(end.cause)
    assert Cause.STOPPED in causes


@pytest.mark.requires("command:strace")
def test_a_signal_that_finds_init_leaving_hides_nothing_of_what_it_said(job: ShimJob) -> None:
    """init, held up between hearing of its child and reaping it, leaves with the shim's request unread (ECONNRESET)."""
    job.shell("kill -STOP $$; exit 9")
    (command,) = job.processes()
    wait_until(lambda: status_field(command, "State")[:1] == "T")
    time.sleep(0.1)  # init has heard of that, and waits again
    init, shim = job.init(), job.shim()
    with traced(init, "read:delay_enter=1000000"):
        os.kill(command, signal.SIGCONT)
        wait_until(lambda: status_field(command, "State")[:1] in ("Z", ""))
        job.stop(grace=60)
        wait_until(lambda: unread(job.directory / "ctl") == 0 and status_field(shim, "State")[:1] == "S")
        os.kill(shim, signal.SIGSTOP)  # it hears nothing before init is gone
        wait_until(lambda: status_field(init, "State")[:1] in ("Z", "X", ""))
        os.kill(shim, signal.SIGCONT)
        end = job.wait()
    assert (end.cause, end.wait_status) == (Cause.OWN, 9 << 8)


def unread(fifo: Path) -> int:
    """Bytes that its reader has still to read."""
    fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    try:
        return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
    finally:
        os.close(fd)


def test_a_deadline_ends_a_job(job: ShimJob) -> None:
    job.start("sleep", "100", timeout=0.3)
    end = job.wait()
    assert (end.cause, end.wait_status) == (Cause.DEADLINE, signal.SIGTERM)
    assert 300_000_000 <= end.wall_ns < at_most(5_000_000_000)


def test_a_deadline_escalates(job: ShimJob) -> None:
    job.shell(DEAF, timeout=0.2, grace=0.3)
    end = job.wait()
    assert (end.cause, end.wait_status) == (Cause.DEADLINE, signal.SIGKILL)
    assert 500_000_000 <= end.wall_ns < at_most(5_000_000_000)


def test_a_deadline_holds_under_a_flood_of_output(job: ShimJob) -> None:
    job.shell("yes & yes >&2 & yes", timeout=0.3, grace=0.2)
    end = job.wait(10)
    assert end.cause is Cause.DEADLINE
    assert end.wall_ns < at_most(8_000_000_000)
    assert end.log_end > 1_000_000


def test_a_stop_is_heard_under_a_flood_of_output(job: ShimJob) -> None:
    job.shell("yes & yes >&2 & yes")
    job.wait_output(b"y\n")
    before = time.monotonic()
    job.stop(grace=60)
    assert job.wait(10).cause is Cause.STOPPED
    assert time.monotonic() - before < at_most(8)


def test_silence_ends_a_job_and_output_puts_it_off(job: ShimJob) -> None:
    job.shell("for i in $(seq 16); do echo $i; sleep 0.1; done; sleep 100", idle_timeout=1.5)
    end = job.wait()
    assert end.cause is Cause.IDLE_TIMEOUT
    assert job.output() == b"".join(b"%d\n" % number for number in range(1, 17))
    assert 2_400_000_000 <= end.wall_ns < at_most(6) * 1e9


def test_output_on_stderr_puts_off_the_idle_timeout_too(job: ShimJob) -> None:
    end = job.run("for i in 1 2 3 4 5; do echo $i >&2; sleep 0.3; done", idle_timeout=1.2)
    assert (end.cause, end.wait_status) == (Cause.OWN, 0)


def test_the_first_reason_stays(job: ShimJob) -> None:
    job.shell(DEAF, timeout=0.5, grace=0.1)
    job.wait_output(b"ready")
    job.stop(grace=60)
    end = job.wait()
    assert (end.cause, end.wait_status) == (Cause.STOPPED, signal.SIGKILL)
    assert end.wall_ns < 2_000_000_000


def test_a_stop_request_survives_its_file() -> None:
    request = StopRequest(reason="shutdown", signal=2, grace=1.5, by="a=b ü")
    assert parse_stop(pack_stop(request)) == request


@pytest.mark.parametrize(
    "raw", [b"", b"x", b"jobrunner-stop=1\0", b"jobrunner-stop=1\0reason=stopped\0signal=x\0grace-ms=1\0", b"\xff\0"]
)
def test_what_is_no_stop_request_is_an_error(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_stop(raw)
