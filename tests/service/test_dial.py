"""Which address of a host a client takes."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from jobrunner.client import dial
from tests.support.http2 import client_context
from tests.support.server import serving
from tests.support.timing import fail_after


class Told(asyncio.Protocol):
    transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport


@pytest.fixture
def silent() -> Iterator[int]:
    """A port whose queue is full: who connects gets no answer."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        stack.enter_context(socket.create_connection(listening.getsockname()))
        yield listening.getsockname()[1]


@pytest.mark.requires("root")
async def test_nothing_small_waits_for_an_acknowledgement_at_either_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        own = int(running.address.rpartition(":")[2])
        made = await dial.dial("127.0.0.1", own, client_context(running), Told(), 10)
        assert made.transport is not None
        with fail_after(10):
            while len(ends := connected(own)) < 2:  # noqa: ASYNC110  # the server has its end a turn later
                await asyncio.sleep(0.01)
        assert ends == [1, 1]
        made.transport.abort()


def connected(port: int) -> list[int]:
    """TCP_NODELAY of each socket of this process that has this port at one of its ends, and is no listener."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as same:
            if same.family == socket.AF_INET and port in (same.getsockname()[1], same.getpeername()[1]):
                found.append(same.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    return found


@pytest.mark.requires("root")
async def test_an_address_that_does_not_answer_holds_up_no_other(
    tmp_path: Path, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as running:
        own = int(running.address.rpartition(":")[2])
        resolve(monkeypatch, silent, silent, own)
        with fail_after(8):
            made = await dial.dial("localhost", own, client_context(running), Told(), 10)
        assert made.transport is not None
        assert made.transport.get_extra_info("peername")[1] == own
        made.transport.abort()


@pytest.mark.requires("root")
async def test_an_address_that_refuses_lets_the_next_one_be_tried_and_the_first_one_s_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refusing = closed.getsockname()[1]
    async with serving(tmp_path) as running:
        own = int(running.address.rpartition(":")[2])
        resolve(monkeypatch, refusing, own)
        made = await dial.dial("localhost", own, client_context(running), Told(), 10)
        assert made.transport is not None
        made.transport.abort()
        resolve(monkeypatch, refusing, 1)
        with pytest.raises(ConnectionRefusedError, match=f"{refusing}"):
            await dial.dial("localhost", own, client_context(running), Told(), 10)


async def test_who_does_not_answer_is_given_up_in_time(silent: int) -> None:
    with pytest.raises(TimeoutError):
        await dial.dial("127.0.0.1", silent, ssl.create_default_context(), Told(), 0.4)


def test_the_families_of_addresses_are_tried_in_turn() -> None:
    six, four = socket.AF_INET6, socket.AF_INET
    found = [(family, socket.SOCK_STREAM, 6, "", number) for number, family in enumerate([six, six, six, four])]
    assert dial._alternating(found) == [(six, 0), (four, 3), (six, 1), (six, 2)]


def resolve(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    """Every name, to these ports of loopback."""

    async def found(*_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found)
