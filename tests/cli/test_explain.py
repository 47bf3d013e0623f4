"""`jobrunner explain`: jobs that really met what is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.cli import jobrunner, shell, start, stop, wait

if TYPE_CHECKING:
    from tests.support.daemon import ServerProcess

pytestmark = pytest.mark.requires("root")


def explained(server: ServerProcess, job_id: str, user: str = "admin") -> str:
    result = jobrunner(server, "explain", job_id, user=user)
    assert (result.code, result.err) == (0, "")
    return result.text


def of_script(server: ServerProcess, script: str, *options: str) -> str:
    job_id = shell(server, script, *options)
    wait(server, job_id)
    return explained(server, job_id)


def test_a_job_that_is_well_has_nothing_to_explain(server: ServerProcess) -> None:
    job_id = shell(server, "exit 0")
    wait(server, job_id)
    first, second, *lacking, last = explained(server, job_id, "viewer").splitlines()
    assert first == f"job {job_id} completed: exit code 0"
    assert second.startswith("admin started it at 2") and second.endswith("s: sh -c 'exit 0'")
    assert f"jobrunner log {job_id}" in last
    assert all(line.startswith("- this host: ") for line in lacking)


def test_a_running_job(server: ServerProcess) -> None:
    job_id = start(server, "--name", "build", "sh", "-c", "sleep 1000 # \x1b[31m")
    text = explained(server, job_id)
    assert text.startswith(f"job {job_id} (build) is running\n") and "it has run for " in text
    assert text.count("\\x1b[31m") == 1 and "\x1b" not in text
    stop(server, job_id)
    assert f"job {job_id} (build) terminated: stopped by admin" in explained(server, job_id)


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("nosuch", "A shell ends with 127 where it did not find a command"),
        ("/etc/passwd", "A shell ends with 126 where it found a command and may not execute it."),
        ("sh -c 'kill -TERM $$'; exit", "A shell ends with 143 where SIGTERM ended a command of its own."),
        ("kill -SEGV $$", "It used memory that is not its own"),
        ("kill -KILL $$", "neither a limit nor jobrunner did"),
        ("exit 3", "- network: it had none; --network host"),
    ],
)
def test_why_a_command_failed(server: ServerProcess, script: str, sentence: str) -> None:
    assert sentence in of_script(server, script)


@pytest.mark.requires("cgroup:memory")
def test_memory(server: ServerProcess) -> None:
    text = of_script(server, "head -c 200000000 /dev/zero | tail -c 200000000", "--memory", "64MiB")
    assert "failed: out of memory: the limit is 67108864 bytes" in text
    assert "When the kernel kills one process for memory, the whole job is ended" in text
    assert "- memory: it had 64MiB of 64MiB at its peak; --memory gives it more" in text


@pytest.mark.requires("cgroup:cpu")
def test_cpu_time(server: ServerProcess) -> None:
    text = of_script(server, "while :; do :; done", "--cpus", "0.1", "--timeout", "1s")
    assert "ended at its deadline of 1.0 s" in text
    assert "- CPU: its limit of 0.1 held it back for " in text


def test_silence(server: ServerProcess) -> None:
    assert "A longer --idle-timeout lets it be silent for longer." in of_script(server, "sleep 1000", "--idle-timeout", "100ms")


def test_dropped_output(server: ServerProcess) -> None:
    text = of_script(server, "head -c 1000000 /dev/zero", "--output-limit", "64KiB")
    assert "- output: of 1000000 bytes the first " in text and "--output-limit keeps more" in text


def test_a_job_that_is_not_there(server: ServerProcess) -> None:
    result = jobrunner(server, "explain", "000000000000")
    assert (result.code, result.out) == (66, b"")
    assert "cannot" in result.err
