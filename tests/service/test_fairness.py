"""Many readers on one connection whose window they share: all get on alike, and who reads nothing takes nobody with him."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest
from h2.events import DataReceived, StreamEnded, TrailersReceived

from tests.support.http2 import RawPeer, framed, raw_peer
from tests.support.server import Running, eventually, message, official_channel, serving, start, subscribe
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

SUBSCRIBE = "/jobrunner.v1.JobService/SubscribeOutput"
MUCH = ("/bin/sh", "-c", "yes | head -c 20000000; exec sleep 600")
READERS = 100
WINDOW = 65535
"""What HTTP/2 begins with, of each stream and of the connection; `RawPeer` leaves it so."""


class Readers:
    """Streams of one connection that follow one job, and what has come of each."""

    def __init__(self, peer: RawPeer) -> None:
        self.peer = peer
        self.got: Counter[int] = Counter()
        self.ended: set[int | None] = set()

    async def begin(self, running: Running, job_id: str, count: int) -> list[int]:
        request = framed(message("JobSubscriptionRequest", job_id=job_id).SerializeToString())
        return [await self.peer.request(SUBSCRIBE, request) for _ in range(count)]

    async def read(self, unread: int = 0) -> None:
        """What comes next; nothing is given back of what one of them has got."""
        for event in await self.peer.receive(read=False):
            if isinstance(event, DataReceived):
                assert event.flow_controlled_length is not None
                self.got[event.stream_id] += event.flow_controlled_length
                if event.stream_id != unread:
                    self.peer.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, TrailersReceived | StreamEnded):
                self.ended.add(event.stream_id)
        await self.peer.flush()
        assert not self.peer.lost


async def test_a_hundred_readers_on_a_small_window_all_get_on_alike(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel, raw_peer(running) as peer:
        readers = Readers(peer)
        streams = await readers.begin(running, await start(channel, *MUCH), READERS)
        with fail_after(40):
            while readers.got.total() < 200 * WINDOW:
                await readers.read()
        least, most = min(readers.got[stream] for stream in streams), max(readers.got.values())
        assert not readers.ended
        assert most - least <= WINDOW, (least, most)


async def test_a_peer_that_reads_slowly_loses_no_call_that_waits_for_others_of_its_own(tmp_path: Path) -> None:
    """A hundred turns take many times as long as a send may go on without progress."""
    seconds = 0.4
    async with serving(tmp_path, send_timeout=seconds) as running, running.channel() as channel, raw_peer(running) as peer:
        readers = Readers(peer)
        streams = await readers.begin(running, await start(channel, *MUCH), READERS)
        begun = anyio.current_time()
        with fail_after(50):
            while len(readers.got) < READERS or min(readers.got.values()) < WINDOW // 4 + 1:
                await readers.read()
                await anyio.sleep(seconds / 16)
        assert anyio.current_time() - begun > 3 * seconds
        assert not readers.ended
        assert set(readers.got) == set(streams)


async def test_a_reader_that_reads_nothing_is_ended_alone(tmp_path: Path) -> None:
    """It has the window that its connection shares, until it is ended and the peer forgets what it holds."""
    async with serving(tmp_path, send_timeout=1) as running, running.channel() as channel, raw_peer(running) as peer:
        readers = Readers(peer)
        job_id = await start(channel, *MUCH)
        (stalled,) = await readers.begin(running, job_id, 1)
        with fail_after(50):
            while readers.got[stalled] < WINDOW:
                await readers.read(unread=stalled)
            others = await readers.begin(running, job_id, READERS - 1)
            while not readers.ended:
                await readers.read(unread=stalled)
            assert readers.ended == {stalled}
            peer.h2.increment_flow_control_window(WINDOW)
            await peer.flush()
            while len(readers.got) < READERS or min(readers.got.values()) < WINDOW // 4:
                await readers.read()
        assert readers.ended == {stalled}
        assert set(others) < set(readers.got)


async def test_a_hundred_calls_of_another_grpc_client_get_on_alike(tmp_path: Path) -> None:
    """gRPC's own, with the windows that it begins with."""
    options = [("grpc.http2.bdp_probe", 0)]
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, *MUCH)
        got: Counter[int] = Counter()
        async with official_channel(running.address, running.authority.pem, running.pair("viewer", "viewer"), options) as own:

            async def read(number: int) -> None:
                output: Any = subscribe(own, job_id=job_id)
                async for part in output:
                    got[number] += len(part.stdout)

            with fail_after(50):
                async with anyio.create_task_group() as tasks:
                    for number in range(READERS):
                        tasks.start_soon(read, number)
                    await eventually(lambda: len(got) == READERS, 40)
                    got.clear()
                    while got.total() < 600 * WINDOW:  # noqa: ASYNC110
                        await anyio.sleep(0.01)
                    tasks.cancel_scope.cancel()
    assert len(got) == READERS
    assert min(got.values()) > max(got.values()) / 4, "of whole messages, which this client also keeps for a while"
