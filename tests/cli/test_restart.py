"""The CLI over a server that is killed and started again: nothing twice, nothing missing, and the exit code of the job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.cli import Running, jobrunner, popen, start
from tests.support.daemon import ServerProcess, stop_all
from tests.support.shim import link_of, wait_until
from tests.support.timing import at_most

pytestmark = [pytest.mark.requires("root"), pytest.mark.timeout(60)]

LINES = 200
TICK = "while [ $i -lt {} ]; do i=$((i+1)); echo line $i; echo 2nd $i >&2; sleep 0.02; done; "
TICKS = f"i=0; {TICK.format(LINES // 2)}while [ ! -e /work/go ]; do sleep 0.02; done; {TICK.format(LINES)}exit 7"
"""The second half only once it may: a server that is killed twice takes as long as it takes."""
OUT = b"".join(b"line %d\n" % number for number in range(1, LINES + 1))
ERR = b"".join(b"2nd %d\n" % number for number in range(1, LINES + 1))
TOLD = b"jobrunner: "


class Killed:
    """A server that can be killed and started again at its address."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.server = ServerProcess(path)

    def again(self) -> None:
        self.server.end(signal.SIGKILL)
        self.server = ServerProcess(self.path, listen=self.server.address)


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Killed]:
    import anyio

    made = Killed(tmp_path)
    try:
        yield made
        anyio.run(stop_all, made.server)
    finally:
        made.server.end()


def connections(server: ServerProcess) -> int:
    """How many sockets the server has."""
    fds = f"/proc/{server.process.pid}/fd"
    return sum(link_of(server.process.pid, f"fd/{name}").startswith("socket:") for name in os.listdir(fds))


def own_words(err: bytes) -> list[bytes]:
    return [line for line in err.splitlines(keepends=True) if line.startswith(TOLD)]


def job_words(err: bytes) -> bytes:
    return b"".join(line for line in err.splitlines(keepends=True) if not line.startswith(TOLD))


def test_followers_runs_and_waits_go_on_over_two_kills(killed: Killed, tmp_path: Path) -> None:
    server = killed.server
    alone = connections(server)
    job_id = start(server, "sh", "-c", TICKS)
    wait_until(lambda: connections(server) == alone, at_most(20))
    commands = {"wait": ("wait", job_id), "log": ("log", "-f", job_id), "run": ("run", "sh", "-c", TICKS)}
    with ExitStack() as stack:
        out, err = (
            {name: stack.enter_context((tmp_path / f"{name}.{to}").open("w+b")) for name in commands} for to in ("out", "err")
        )
        processes = {}
        for name, words in commands.items():
            processes[name] = stack.enter_context(popen(server, *words, stdout=out[name].fileno(), stderr=err[name].fileno()))
            # One that was never connected would be told at once: `wait`, which says nothing, is while the others start.
            wait_until(lambda: connections(server) > alone, at_most(20))
        wait_until(lambda: all(b"line 1\n" in (tmp_path / f"{name}.out").read_bytes() for name in ("log", "run")), at_most(20))
        for _ in range(2):
            killed.again()
        for work in (killed.server.state / "jobs").glob("*/work"):
            (work / "go").touch()
        codes = {name: process.wait(at_most(40)) for name, process in processes.items()}
    said = {name: ((tmp_path / f"{name}.out").read_bytes(), (tmp_path / f"{name}.err").read_bytes()) for name in commands}
    for name in ("log", "run"):
        assert (said[name][0], job_words(said[name][1])) == (OUT, ERR), name
        assert own_words(said[name][1]), f"{name} has told nobody that the server was away"
    assert said["wait"][0] == b"failed: exit code 7\n"
    assert codes == {"log": 0, "run": 7, "wait": 7}


def test_a_stop_under_way_is_carried_out_and_told_once(killed: Killed) -> None:
    job_id = start(killed.server, "sh", "-c", "trap 'echo asked; sleep 2; exit 5' TERM; echo up; while :; do sleep 0.05; done")
    with popen(killed.server, "log", "-f", job_id) as follow, popen(killed.server, "stop", job_id) as stop:
        wait_for(follow, b"asked\n")
        killed.again()
        out, err = stop.communicate(timeout=at_most(40))
        rest, _ = follow.communicate(timeout=at_most(40))
    assert (stop.returncode, out, rest, follow.returncode) == (0, b"", b"", 0)
    assert b"already" not in err
    assert jobrunner(killed.server, "wait", job_id).text == "terminated: stopped by admin (exit code 5)\n"


def test_ctrl_c_of_a_run_while_the_server_is_away_stops_the_job_when_it_is_back(killed: Killed) -> None:
    server = killed.server
    with popen(
        server, "run", "-n", "away", "sh", "-c", "trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.05; done"
    ) as run:
        wait_for(run, b"up\n")
        server.end(signal.SIGKILL)
        run.send_signal(signal.SIGINT)
        time.sleep(0.3)  # it asks nobody
        killed.server = ServerProcess(killed.path, listen=server.address)
        out, _ = run.communicate(timeout=at_most(40))
    assert (run.returncode, out) == (9, b"bye\n")


def wait_for(process: Running, line: bytes) -> None:
    """Read its output up to this line."""
    assert process.stdout is not None
    while (read := process.stdout.readline()) != line:
        assert read, f"it ended before {line!r}"
