"""The one hint that a person at a terminal gets when a command without network has failed."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.cli import jobrunner, popen, shell
from tests.support.daemon import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.requires("root")

HINT = b"hint: the job had no network; --network host"


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal: what a program writes to the second descriptor is read from the first."""
    ours, theirs = os.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(theirs)
        os.close(ours)


def told_at_a_terminal(server: ServerProcess, *args: str) -> bytes:
    """What a CLI writes to a terminal that is its standard error; it is little, so the terminal holds all of it."""
    with terminal() as (ours, theirs):
        with popen(server, *args, stderr=theirs) as process:
            process.communicate(timeout=40)
        os.set_blocking(ours, False)
        try:
            return os.read(ours, 65536)
        except BlockingIOError:
            return b""


def test_run_hints_at_the_network_once(server: ServerProcess) -> None:
    assert told_at_a_terminal(server, "run", "sh", "-c", "exit 3").count(HINT) == 1


def test_wait_hints_at_the_network_once(server: ServerProcess) -> None:
    assert told_at_a_terminal(server, "wait", shell(server, "exit 3")).count(HINT) == 1


@pytest.mark.parametrize("script", ["exit 0", "kill -9 $$"])
def test_no_hint_where_the_network_has_no_part_in_it(server: ServerProcess, script: str) -> None:
    assert HINT not in told_at_a_terminal(server, "run", "sh", "-c", script)


def test_no_hint_where_nobody_is_at_a_terminal(server: ServerProcess) -> None:
    assert jobrunner(server, "run", "sh", "-c", "exit 3").err == ""


def test_no_hint_for_a_job_that_had_the_hosts_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBRUNNERD_NETWORK_HOST", "true")
    running = ServerProcess(tmp_path)
    try:
        assert told_at_a_terminal(running, "run", "--network", "host", "sh", "-c", "exit 3") == b""
    finally:
        running.end()


def test_a_word_that_is_no_network_is_refused_by_name(server: ServerProcess) -> None:
    result = jobrunner(server, "start", "--network", "bridge", "true")
    assert (result.code, result.err) == (65, "jobrunner: cannot start job: network: 'bridge' is none of none, host\n")


def test_the_hosts_network_is_refused_in_the_servers_words(server: ServerProcess) -> None:
    result = jobrunner(server, "start", "--network", "host", "true")
    assert result.code == 65
    assert "network: this server gives jobs no network (network_host = true" in result.err
