"""`jobrunner run`: start, follow, exit with the job's code; what signals and closed pipes do to it."""

from __future__ import annotations

import fcntl
import signal
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.cli import jobrunner, popen, start, stop
from tests.support.timing import at_most

if TYPE_CHECKING:
    import subprocess

    from tests.support.daemon import ServerProcess

pytestmark = pytest.mark.requires("root")


def newest(server: ServerProcess, name: str) -> str:
    """The id of the newest job of this name."""
    return jobrunner(server, "ls", "-q", "-n", name).text.split()[0]


def first_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("code", [0, 1, 2, 64, 127, 130, 255])
def test_run_exits_with_the_jobs_code_and_says_nothing_of_its_own(server: ServerProcess, code: int) -> None:
    result = jobrunner(server, "run", "sh", "-c", f"echo out; echo err >&2; exit {code}")
    assert (result.code, result.out, result.err) == (code, b"out\n", "err\n")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_run_exits_with_128_and_the_signal_and_says_so(server: ServerProcess, number: signal.Signals) -> None:
    result = jobrunner(server, "run", "sh", "-c", f"kill -{int(number)} $$")
    assert result.code == 128 + number
    assert result.err.endswith(f" failed: killed by {number.name}\n")
    assert len(result.err.splitlines()) == 1


def test_run_says_that_the_deadline_has_passed(server: ServerProcess) -> None:
    result = jobrunner(server, "run", "--timeout", "300ms", "sleep", "1000")
    assert result.code == 143
    assert "terminated: ended at its deadline of 0.3 s" in result.err


def test_a_stopped_job_that_exits_with_0_is_no_success(server: ServerProcess) -> None:
    result = jobrunner(server, "run", "--timeout", "300ms", "sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done")
    assert result.code == 125


def test_ctrl_c_stops_the_job(server: ServerProcess) -> None:
    with popen(server, "run", "-n", "ctrl-c", "sh", "-c", "echo ready; exec sleep 1000") as process:
        assert first_line(process) == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert err.decode().splitlines()[-1].endswith("terminated: stopped by admin (killed by SIGTERM)")
    assert jobrunner(server, "status", newest(server, "ctrl-c")).text == "terminated\n"


def test_sigterm_stops_the_job_too_and_its_last_words_are_shown(server: ServerProcess) -> None:
    script = "trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    with popen(server, "run", "sh", "-c", script) as process:
        assert first_line(process) == b"ready\n"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (9, b"bye\n")


def test_the_second_ctrl_c_leaves_while_the_job_has_its_grace_period(server: ServerProcess) -> None:
    script = "trap 'echo asked' TERM; echo ready; while :; do sleep 0.05; done"
    with popen(server, "run", "-n", "twice", "--grace", "60s", "sh", "-c", script) as process:
        assert first_line(process) == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert first_line(process) == b"asked\n"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=5)
    assert process.returncode == 130
    job_id = newest(server, "twice")
    assert jobrunner(server, "status", job_id).text == "running\n"
    stop(server, job_id)


def test_a_closed_standard_output_stops_the_job_quietly(server: ServerProcess) -> None:
    with popen(server, "run", "-n", "closed", "yes") as process:
        assert first_line(process) == b"y\n"
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (141, b"")
    assert jobrunner(server, "status", newest(server, "closed")).text == "terminated\n"


def test_ctrl_c_works_while_nobody_reads_standard_output(server: ServerProcess) -> None:
    with popen(server, "run", "-n", "unread", "yes") as process:
        wait_until_full(process)
        process.send_signal(signal.SIGINT)
        wait_for_status(server, newest(server, "unread"), "terminated")
        process.send_signal(signal.SIGINT)
        assert process.wait(at_most(5)) == 130


def test_ctrl_c_leaves_a_log_that_is_followed_while_nobody_reads(server: ServerProcess) -> None:
    job_id = start(server, "sh", "-c", "yes | head -c 100000000; exec sleep 600")
    with popen(server, "log", "-f", job_id) as process:
        wait_until_full(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(at_most(5)) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert jobrunner(server, "status", job_id).text == "running\n"
    stop(server, job_id)


def test_output_that_cannot_be_written_is_one_line_and_stops_the_job(server: ServerProcess) -> None:
    with Path("/dev/full").open("wb") as full, popen(server, "run", "-n", "full", "yes", stdout=full.fileno()) as process:
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (74, b"jobrunner: cannot write to standard output: No space left on device\n")
    assert jobrunner(server, "status", newest(server, "full")).text == "terminated\n"


def wait_until_full(process: subprocess.Popen[bytes]) -> None:
    """Return when the pipe is at least half full, and nobody reads: the next chunk does not fit."""
    assert process.stdout is not None

    size = fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ)
    deadline = time.monotonic() + 20
    held = b"\0" * 4
    while int.from_bytes(held, "little") < size // 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)  # A pipe tells nobody that it is full.
        held = fcntl.ioctl(process.stdout, termios.FIONREAD, b"\0" * 4)


def wait_for_status(server: ServerProcess, job_id: str, status: str) -> None:
    """Return when the job has ended, and see that it has this status."""
    result = jobrunner(server, "wait", job_id)
    assert result.text.startswith(f"{status}: "), result
