"""Connections that are given up, at any moment, by either side: nothing of them is left, not even to the garbage collector."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import pytest

from jobrunner.client import JobClient
from tests.support.handshake import Handshake, nothing_left
from tests.support.http2 import client_context
from tests.support.server import Running, eventually, serving
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

TURNS = 60
"""Of the loop: more than a first call takes."""
STRIDE = 7
ALL = 1 << 20


def client_of(running: Running) -> JobClient:
    pair = running.pair("admin", "admin")
    return JobClient(running.address, ca=running.authority.pem, cert=pair.cert, key=pair.key, resume_timeout=0)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def closed(peer: Handshake) -> None:
    """By the server, in whatever way."""
    with suppress(OSError), fail_after(10):
        while await peer.reader.read(65536):
            pass


async def test_a_client_that_is_cancelled_in_any_turn_of_the_loop_leaves_nothing(tmp_path: Path) -> None:
    async def ask() -> None:
        async with client_of(running) as client:
            await client.server()

    with nothing_left():
        async with serving(tmp_path) as running:
            for count in range(TURNS):
                task = asyncio.create_task(ask())
                await turns(count)
                task.cancel()
                await asyncio.wait([task])
            await ask()
            await eventually(lambda: not running.server.listener.open)


async def test_a_server_that_closes_in_any_turn_after_connections_came_leaves_nothing(tmp_path: Path) -> None:
    with nothing_left():
        for count in range(10):
            async with serving(tmp_path / str(count)) as running:
                peers = [await Handshake(client_context(running)).connect(running.address) for _ in range(3)]
                for peer in peers:
                    await peer.send(1)
                await turns(count)
            assert not running.server.listener.open
            for peer in peers:
                await closed(peer)
                peer.vanish()


async def test_who_vanishes_at_any_byte_of_a_handshake_leaves_nothing(tmp_path: Path) -> None:
    with nothing_left():
        async with serving(tmp_path) as running:
            context = client_context(running)
            whole = await Handshake(context).connect(running.address)
            await whole.send(ALL)
            whole.vanish()
            files = len(os.listdir("/proc/self/fd"))
            for most in [*range(1, whole.sent, STRIDE), whole.sent - 1]:
                peer = await Handshake(context).connect(running.address)
                await peer.send(most)
                peer.vanish(reset=bool(most % 2))
            await eventually(lambda: not running.server.listener.open)
            assert len(os.listdir("/proc/self/fd")) < files + 3
            async with client_of(running) as client:
                await client.server()


async def test_a_server_that_closes_drops_handshakes_whatever_of_them_has_come(tmp_path: Path) -> None:
    with nothing_left():
        async with serving(tmp_path, max_pending_handshakes=1000) as running:
            context = client_context(running)
            whole = await Handshake(context).connect(running.address)
            await whole.send(ALL)
            whole.vanish()
            peers = []
            for most in range(1, whole.sent, 16 * STRIDE):
                peers.append(await Handshake(context).connect(running.address))
                await peers[-1].send(most)
            await eventually(lambda: len(running.server.listener.pending) == len(peers))
        for peer in peers:
            await closed(peer)
            peer.vanish()


async def test_who_must_give_way_before_his_turn_has_come_is_closed(tmp_path: Path) -> None:
    """More come in one turn of the loop than there may be."""
    with nothing_left():
        async with serving(tmp_path, max_pending_handshakes=1) as running:
            context = client_context(running)
            peers = [await Handshake(context).connect(running.address) for _ in range(8)]
            for peer in peers:
                peer.writer.write(b"\x16")
            for peer in peers[:-1]:
                await closed(peer)
            assert len(running.server.listener.open) == len(running.server.listener.pending) == 1
            for peer in peers:
                peer.vanish()
