"""The CLI where its standard descriptors are full, closed, or nobody's any more, and what signals do to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.cli import jobrunner, popen, shell, stop, wait

if TYPE_CHECKING:
    from tests.support.daemon import ServerProcess

pytestmark = pytest.mark.requires("root")

PROGRAM = str(Path(sys.executable).with_name("jobrunner"))
FULL = "jobrunner: cannot write to standard output: No space left on device\n"
COMMANDS = ("", "certs issue")


def sh(server: ServerProcess, line: str) -> subprocess.CompletedProcess[str]:
    """What a shell line does whose `$0` is jobrunner."""
    command = ["sh", "-c", line, PROGRAM]
    return subprocess.run(command, env=server.environ(), capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def ended(server: ServerProcess) -> str:
    """A job that has written a line and ended."""
    job_id = shell(server, "echo x")
    wait(server, job_id)
    return job_id


@pytest.mark.parametrize("command", COMMANDS)
def test_help_that_cannot_be_written_is_told(server: ServerProcess, command: str) -> None:
    done = sh(server, f'exec "$0" {command} --help > /dev/full')
    assert (done.returncode, done.stderr) == (74, FULL)


@pytest.mark.parametrize("command", ["--version", "log -t {}", "info {}", "ls"])
def test_a_result_that_cannot_be_written_is_told(server: ServerProcess, ended: str, command: str) -> None:
    done = sh(server, f'exec "$0" {command.format(ended)} > /dev/full')
    assert (done.returncode, done.stderr) == (74, FULL)


def test_a_start_whose_id_cannot_be_written_is_told(server: ServerProcess) -> None:
    done = sh(server, 'exec "$0" start true > /dev/full')
    assert (done.returncode, done.stderr) == (74, FULL)


def test_standard_error_that_cannot_be_written_changes_no_exit_code(server: ServerProcess) -> None:
    for where in ("2> /dev/full", "<&- 2>&-"):
        done = sh(server, f'exec "$0" status 0123456789ab {where}')
        assert (done.returncode, done.stdout, done.stderr) == (66, "", "")


@pytest.mark.parametrize("command", ["--help", "ls"])
def test_an_output_that_nobody_reads_ends_it_without_a_word(server: ServerProcess, command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with popen(server, command, stdout=writing) as process:
        os.close(writing)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (141, b"")


def test_run_without_any_open_descriptor_runs_the_job(server: ServerProcess) -> None:
    assert sh(server, 'exec "$0" run -- sh -c "exit 7" <&- >&- 2>&-').returncode == 7


def test_the_end_of_the_terminal_stops_the_job_of_run(server: ServerProcess) -> None:
    script = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done"
    with popen(server, "run", "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGHUP)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (3, b"bye\n")
    assert b"stopping job" in err


def test_nohup_keeps_run_and_its_job_over_the_terminal_s_end(server: ServerProcess) -> None:
    # A signal that came too early for the shell's trap would end it: the first line is the job's.
    command = ["sh", "-c", "trap '' HUP; exec \"$0\" run -- sh -c 'echo up; sleep 0.5; exit 4'", PROGRAM]
    with subprocess.Popen(command, env=server.environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, b"stopping" in err) == (4, False)


def test_a_signal_to_a_follower_leaves_the_job_running(server: ServerProcess) -> None:
    job_id = shell(server, "echo up; sleep 1000")
    with popen(server, "log", "-f", job_id) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert jobrunner(server, "status", job_id).text == "running\n"
    stop(server, job_id)
