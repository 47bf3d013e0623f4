"""A job and the processes around it: the host's, other jobs', its own pid 1, and its own that do not want to end."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator

import pytest

from jobrunner import Limits
from jobrunner.shim import binary_path
from tests.hostile.arena import Arena, outside, process_of, program
from tests.support.runner import output, processes_with
from tests.support.shim import all_pids, read_proc, wait_until
from tests.support.timing import at_most

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.requires("root", "command:python3")]


@pytest.fixture
def victim() -> Iterator[str]:
    """The pid of a process of the host, that ends with the test."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield str(process.pid)
    finally:
        process.kill()
        process.wait()


ON_THE_HOST = {"a signal": "send_signal", "ptrace": "trace", "its memory": "peek", "its environment": "environment_of"}


@pytest.mark.parametrize("name", ON_THE_HOST.values(), ids=ON_THE_HOST)
async def test_processes_of_the_host_do_not_exist_in_a_job(arena: Arena, victim: str, name: str) -> None:
    """Their numbers mean nobody in its PID namespace."""
    assert (await arena.attack("processes", name, victim)).text in ("refused: ESRCH", "refused: ENOENT")
    assert outside("processes", name, victim).startswith("succeeded")


async def test_a_signal_to_everyone_reaches_the_jobs_own_only(arena: Arena) -> None:
    """Its control is in it: a child of the job dies of that signal. On the host it would be the end of all."""
    assert (await arena.attack("processes", "everyone")).text == f"succeeded: our own died of {signal.SIGKILL:d}"
    await arena.heartbeat()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
async def test_pid_1_is_not_ended_from_within(arena: Arena, number: signal.Signals) -> None:
    """The kernel gives a namespace's own pid 1 only the signals that it handles (pid_namespaces(7)). From outside it dies."""
    outcome = await arena.attack("processes", "send_signal", "1", str(int(number)))
    assert outcome.info.end_reason == "exited"
    job = await arena.start("sleep", "600")
    os.kill(process_of(job, 1), signal.SIGKILL)
    assert (await job.wait()).end_reason == "lost"


async def test_nothing_stays_in_the_background(arena: Arena) -> None:
    mark = uuid.uuid4().hex
    assert (await arena.attack("processes", "daemonize", mark)).word == "succeeded"
    assert processes_with(f": {mark}") == []
    assert outside("processes", "daemonize", mark).startswith("succeeded")
    try:
        wait_until(lambda: processes_with(f": {mark}") != [])
    finally:
        kill_marked(f": {mark}")


def kill_marked(mark: str) -> None:
    for pid in all_pids():
        if mark.encode() in read_proc(pid, "cmdline"):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("name", "number"), [("ignore_everything", signal.SIGKILL), ("stop_everything", signal.SIGTERM)])
async def test_who_ignores_every_signal_or_is_stopped_is_ended_and_told(arena: Arena, name: str, number: signal.Signals) -> None:
    """The stop signal also lets go on who was stopped, so that it is heard."""
    job = await arena.start(*program("processes", name))
    async with job.log() as reader:
        assert (await reader.next_line()) is not None
    info = await job.stop(grace=0.2, by="bob")
    assert (info.status, info.end_reason, info.stopped_by, info.signal) == ("terminated", "stopped", "bob", number)
    await arena.heartbeat()


async def test_who_ignores_every_signal_is_not_ended_by_one(arena: Arena) -> None:
    """The control: it takes more than the signals that end everybody else."""
    ignores = subprocess.Popen(program("processes", "ignore_everything"), stdout=subprocess.PIPE)  # noqa: ASYNC220
    usual = subprocess.Popen(["sleep", "600"])  # noqa: ASYNC220
    try:
        assert ignores.stdout is not None
        assert ignores.stdout.readline() == b"ready\n"
        for process in (ignores, usual):
            process.terminate()
        assert usual.wait(at_most(10)) == -signal.SIGTERM
        assert ignores.poll() is None
    finally:
        for process in (ignores, usual):
            process.kill()
            process.communicate()


async def test_who_stops_himself_meets_his_deadline(arena: Arena) -> None:
    outcome = await arena.attack("processes", "stop_everything", limits=Limits(timeout=1), grace=0)
    assert (outcome.info.status, outcome.info.end_reason) == ("terminated", "deadline")


async def test_a_job_whose_main_thread_has_ended_is_still_seen_to_its_end(arena: Arena) -> None:
    outcome = await arena.attack("processes", "thread_and_leave", "0.3")
    assert (outcome.info.status, outcome.info.exit_code) == ("completed", 0)


async def test_the_helper_executed_in_a_job_starts_nothing(arena: Arena) -> None:
    """At the moment of execve(2) /proc/self/exe is the helper: a job can become it, and it is then the job's own process."""
    job = await arena.start("/proc/self/exe")
    info = await job.wait()
    assert (info.end_reason, info.exit_code) == ("exited", 1)


async def test_the_helper_has_no_more_rights_in_a_job_than_the_job(arena: Arena) -> None:
    """Its probe tries all that a birth does; the control is the server's own check of this host."""
    job = await arena.start("/proc/self/exe", "probe")
    lines = (await output(job)).decode().splitlines()
    assert len(lines) > 5
    assert [line for line in lines if not line.split(" ", 1)[1].startswith("failed")] == []
    of_the_host = subprocess.run([binary_path(), "probe"], capture_output=True, text=True, check=True).stdout  # noqa: ASYNC221
    assert len([line for line in of_the_host.splitlines() if line.endswith("started")]) > 8


async def test_the_helpers_program_is_never_written_to(arena: Arena) -> None:
    assert (await arena.attack("processes", "overwrite_helper", "1")).text == "refused: EACCES"
    root = await arena.attack("processes", "overwrite_helper", "1", without=["uid", "capabilities"])
    assert root.text == "refused: ETXTBSY"  # a program that runs is written to by nobody: execve(2)


async def test_debuggers_work_on_ones_own(arena: Arena) -> None:
    assert (await arena.attack("processes", "trace_own_child")).text == "succeeded: attached"
