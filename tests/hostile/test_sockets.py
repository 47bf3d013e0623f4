"""What listens on the host, and the job's own pipe in a stranger's hands."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from tests.hostile.arena import Arena, outside

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.requires("root", "command:python3")]


@pytest.fixture
def abstract() -> Iterator[str]:
    name = f"jobrunner-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        yield f"@{name}"


async def test_abstract_sockets_of_the_host_are_not_there(arena: Arena, abstract: str) -> None:
    assert (await arena.attack("sockets", "connect_unix", abstract)).text == "refused: ECONNREFUSED"
    assert outside("sockets", "connect_unix", abstract) == "succeeded: connected"


async def test_services_on_the_hosts_loopback_are_not_there(arena: Arena) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert (await arena.attack("sockets", "connect_tcp", "127.0.0.1", port)).text == "refused: ECONNREFUSED"
        assert outside("sockets", "connect_tcp", "127.0.0.1", port) == "succeeded: connected"
