"""Who sends much waits for nobody but himself: pieces of frames, turns of users and of addresses."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobrunner.server.frames import PIECE, PREFACE, FrameMeter
from jobrunner.server.turns import Gate, Turns
from tests.support.http2 import framed, raw_peer
from tests.support.server import eventually, serving

QUERY = "/jobrunner.v1.JobService/QueryStatus"


async def test_of_each_name_one_thing_is_done_in_a_turn_of_the_loop() -> None:
    turns = Turns()
    done: list[str] = []
    for number in range(3):
        turns.take("many", partial(done.append, f"many {number}"))
    turns.take("few", lambda: done.append("few 0"))
    assert done == ["many 0", "few 0"], "who is alone does not wait"
    turns.take("few", lambda: done.append("few 1"))
    await asyncio.sleep(0)
    assert sorted(done[2:]) == ["few 1", "many 1"]
    await eventually(lambda: repr(turns) == "<Turns 1 {}>")
    assert done[4:] == ["many 2"]
    turns = Turns(2)
    for number in range(3):
        turns.take("x", partial(done.append, f"x{number}"))
    assert done[5:] == ["x0", "x1"]
    await eventually(lambda: done[5:] == ["x0", "x1", "x2"])


async def test_of_all_names_so_much_is_done_in_a_turn_and_each_comes_to_its_own() -> None:
    turns = Turns(2, 3)
    done: list[str] = []
    seen: list[int] = []
    for number in range(4):
        for name in "abcde":
            turns.take(name, partial(done.append, f"{name}{number}"))
    while len(done) < 20:
        seen.append(len(done))
        await asyncio.sleep(0)
    assert seen[:6] == [3, 6, 9, 12, 15, 18], "three in a turn"
    order = "a0 b0 c0 d0 d1 e0 a1 a2 b1 c1 c2 d2 e1 e2 a3"
    assert done[:15] == order.split(), "who has had his turn is behind the others"
    await eventually(lambda: repr(turns) == "<Turns 2 {}>")


async def test_an_error_of_one_is_not_the_others() -> None:
    turns = Turns()
    done: list[int] = []
    told: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
    turns.take("bad", lambda: None)
    turns.take("good", lambda: None)
    turns.take("bad", partial(os.close, -1))
    turns.take("good", lambda: done.append(1))
    await eventually(lambda: repr(turns) == "<Turns 1 {}>")
    assert (done, told) == ([1], ["error in the turn of 'bad'"])


async def test_a_gate_lets_so_many_of_each_name_pass_in_a_turn() -> None:
    gate, passed = Gate(2), []

    async def go(name: str, number: int) -> None:
        await gate.turn(name)
        passed.append(f"{name}{number}")

    tasks = [asyncio.create_task(go("a", number)) for number in range(6)] + [asyncio.create_task(go("b", 0))]
    await asyncio.sleep(0)
    assert passed == ["a0", "a1", "b0"]
    tasks[2].cancel()
    await eventually(lambda: len(passed) == 6)
    assert passed[3:] == ["a3", "a4", "a5"]
    await eventually(lambda: repr(gate) == "<Gate 2 {}>")
    await go("a", 7)
    assert passed[-1] == "a7"
    await asyncio.wait(tasks)


def frame(kind: int, length: int) -> bytes:
    return struct.pack("!I", length)[1:] + bytes([kind, 0]) + bytes(4 + length)


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 1, 8, 255, 256, 900])), max_size=150), st.integers(1, 5000))
def test_pieces_are_what_came_and_as_many_frames_whatever_the_reads_were(frames: list[tuple[int, int]], read: int) -> None:
    data = bytes(PREFACE) + b"".join(frame(kind if kind != 4 else 6, length) for kind, length in frames)
    meter, found, parts = FrameMeter(16384), 0, []
    for at in range(0, len(data), read):
        count, pieces = meter.pieces(data[at : at + read])
        found += count
        parts += pieces
        assert len(pieces) <= read // 9 // PIECE + 2
    assert b"".join(parts) == data
    assert found == sum(kind != 0 or length < 256 for kind, length in frames)


def test_padding_is_not_something_that_data_carries() -> None:
    meter = FrameMeter(16384)
    meter.pieces(bytes(PREFACE))
    long, padded = frame(0, 300), bytearray(frame(0, 300))
    padded[4] = 8
    assert [meter.pieces(bytes(each))[0] for each in (long, padded)] == [0, 1]


@pytest.mark.requires("root")
async def test_a_long_read_is_handled_piece_by_piece_and_nothing_more_is_read_meanwhile(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == "5"
        (protocol,) = running.server._connections
        protocol.data_received(frame(6, 8) * (PIECE * 10))
        assert len(protocol._pieces) == 9
        assert not protocol.transport.is_reading()
        await eventually(lambda: not protocol._pieces)
        assert protocol.transport.is_reading()
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == "5"


@pytest.mark.requires("root")
async def test_a_connection_that_is_ended_while_its_peer_is_gone_already_is_closed(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        async with raw_peer(running) as peer:
            await peer.status(await peer.request(QUERY, framed(b"")))
            (protocol,) = running.server._connections
            protocol.data_received(frame(6, 8) * (PIECE * 10) + frame(6, 7))  # the last one is an error
            peer.writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
            await eventually(lambda: not protocol._pieces)
        await eventually(lambda: not running.server.listener.live)


@pytest.mark.requires("root")
async def test_a_connection_that_is_lost_while_it_waits_is_forgotten(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        async with raw_peer(running) as peer:
            await peer.status(await peer.request(QUERY, framed(b"")))
            (protocol,) = running.server._connections
            protocol.data_received(frame(6, 8) * (PIECE * 10))
            protocol.transport.abort()
        await eventually(lambda: repr(protocol.shared.turns) == "<Turns 1 {}>")
        async with raw_peer(running) as peer:
            assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == "5"
