"""What a service manager hears of a server: a real jobrunnerd, and this test as its manager (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner.server.notify import ServiceManager
from tests.support.daemon import ServerProcess
from tests.support.timing import at_most


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(address)
        bound.settimeout(at_most(20))
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield bound


def heard(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())


def test_it_is_told_when_the_server_is_ready_lives_and_stops(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    server = ServerProcess(tmp_path)
    try:
        assert heard(manager) == {"READY": "1", "STATUS": f"listening on {server.address}"}
        assert [heard(manager) for _ in range(3)] == [{"WATCHDOG": "1"}] * 3
    finally:
        assert server.end() == 0
    last = heard(manager)
    while "WATCHDOG" in last:
        last = heard(manager)
    assert last == {"STOPPING": "1", "STATUS": "shutting down", "EXTEND_TIMEOUT_USEC": "35000000"}


def test_an_abstract_address_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(f"\0jobrunner-test-{os.getpid()}")
        ServiceManager({"NOTIFY_SOCKET": f"@jobrunner-test-{os.getpid()}"}).ready("up")
        assert bound.recv(100) == b"READY=1\nSTATUS=up"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}])
async def test_without_a_watchdog_of_its_own_nothing_is_fed(environ: dict[str, str]) -> None:
    await ServiceManager(environ).keep_alive()


def test_a_manager_that_is_gone_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager({"NOTIFY_SOCKET": "/nonexistent"}).ready("up")
    assert "cannot tell the service manager 'READY=1': No such file or directory" in caplog.text
