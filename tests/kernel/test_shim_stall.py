"""A disk that stalls: no write to the log comes back, not even for SIGKILL, and a job's times hold all the same."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from jobrunner.shim.exitrecord import Cause
from tests.support.shim import ShimJob, read_proc, wait_until
from tests.support.stall import stalled
from tests.support.timing import at_most

pytestmark = [pytest.mark.requires("root", "command:mkfs.ext4", "command:fsfreeze"), pytest.mark.timeout(60)]

CHATTY = "i=0; while :; do echo $i; i=$((i + 1)); sleep 0.01; done"
FLOOD = "exec head -c 2000000 /dev/zero"
"""More than the pipe holds."""


def is_stuck(shim: int) -> bool:
    """Whether a thread of it is in uninterruptible sleep."""
    states = [read_proc(shim, f"task/{task}/stat") for task in os.listdir(f"/proc/{shim}/task")]
    return any(state.rpartition(b")")[2].split()[0] == b"D" for state in states)


def wait_dead(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(at_most(10) * 1000), "it lives"


def test_deadline_idle_timeout_and_kill_hold_while_the_disk_stalls_and_are_told_after_it(own_disk: Path) -> None:
    jobs = {name: ShimJob(own_disk / name) for name in ("deadline", "idle", "stop")}
    jobs["deadline"].shell(CHATTY, timeout=2.5, grace=0.2)
    jobs["idle"].shell(f"{CHATTY.replace(':;', '[ $i -lt 150 ];')}; exec sleep 100", idle_timeout=1.0, grace=0.2)
    jobs["stop"].shell(f"trap : TERM; {CHATTY}")
    for job in jobs.values():
        job.wait_output(b"1\n")
    jobs["stop"].stop(grace=2.0)  # as the other times, longer than it takes to stall the disk
    inits = [os.pidfd_open(job.init()) for job in jobs.values()]
    with stalled(own_disk):
        for pidfd in inits:
            wait_dead(pidfd)
            os.close(pidfd)
        assert all(is_stuck(job.shim()) for job in jobs.values())
    ends = {name: job.wait() for name, job in jobs.items()}
    assert [end.cause for end in ends.values()] == [Cause.DEADLINE, Cause.IDLE_TIMEOUT, Cause.STOPPED]
    assert ends["deadline"].wall_ns >= 2_500_000_000
    for name, job in jobs.items():
        numbers = job.output().split()
        assert numbers == [b"%d" % number for number in range(len(numbers))]
        assert ends[name].lost == 0


def test_a_job_that_waits_for_the_disk_is_not_silent(own_disk: Path) -> None:
    job = ShimJob(own_disk / "job")
    os.mkfifo(own_disk / "go")
    job.shell(f"({CHATTY}) & read _ <{own_disk}/go; kill $!; {FLOOD}", idle_timeout=0.8)
    job.wait_output(b"1\n")
    with stalled(own_disk):
        (own_disk / "go").write_text("go\n")
        wait_until(lambda: is_stuck(job.shim()))
        select.select([], [], [], 2.4)  # the time that it would be given, three times over
        assert job.processes()
    end = job.wait()
    assert (end.cause, end.wait_status, end.lost) == (Cause.OWN, 0, 0)
    assert end.log_end > 2_000_000


def test_a_shim_that_is_killed_while_it_waits_for_the_disk_takes_its_job_with_it_at_once(own_disk: Path) -> None:
    job = ShimJob(own_disk / "job")
    job.shell(CHATTY)
    job.wait_output(b"1\n")
    init, shim = os.pidfd_open(job.init()), job.shim()
    with stalled(own_disk):
        wait_until(lambda: is_stuck(shim))
        os.kill(shim, signal.SIGKILL)
        wait_dead(init)
    os.close(init)
    job.wait()
