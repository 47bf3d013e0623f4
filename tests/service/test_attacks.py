"""What a hostile peer can do to a server with its usual settings: nothing that an innocent client notices, nothing that stays."""

from __future__ import annotations

import asyncio
import random
import ssl
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

import anyio
import pytest
from hpack import Encoder

from jobrunner.output import Chunk
from tests.support.attack import FACTOR, LIMITS, Innocent, attacked, tls_peer, waves
from tests.support.daemon import ServerProcess, server_process
from tests.support.http2 import HEADERS, RawPeer, framed
from tests.support.protobuf import official

pytestmark = [pytest.mark.requires("root"), pytest.mark.timeout(60 * FACTOR)]

MIB = 1 << 20
QUERY = "/jobrunner.v1.JobService/QueryStatus"
START = "/jobrunner.v1.JobService/Start"
SUBSCRIBE = "/jobrunner.v1.JobService/SubscribeOutput"
ALLOWANCE = 24 * MIB
"""What the server may grow by in any attack here; each would take hundreds of MiB, or the loop, of a server without bounds."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    # It ends with the tests, however these end.
    with server_process(tmp_path_factory.mktemp("attacked"), before=("setpriv", "--pdeathsig", "TERM")) as running:
        yield running


@pytest.fixture(scope="module")
def innocent(target: ServerProcess) -> Iterator[Innocent]:
    client = Innocent(target)
    yield client
    client.close()


def frame(kind: int, payload: bytes, *, flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack("!I", len(payload))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + payload


async def pour(peer: RawPeer, data: bytes, times: int, *, read: bool = True) -> None:
    """Send this again and again, until it is done or the server has closed the connection; reading the answers, or not."""

    async def drain() -> None:
        with suppress(OSError):
            while await peer.reader.read(65536):
                pass

    reading = asyncio.create_task(drain()) if read else None
    if not read:
        peer.pause()
    with suppress(OSError), anyio.move_on_after(20):
        for _ in range(times):
            peer.writer.write(data)
            await peer.writer.drain()
            if peer.writer.transport.is_closing() or (reading is not None and reading.done()):
                break
    if reading is not None:
        reading.cancel()
        await asyncio.wait([reading])


async def test_bare_connections(target: ServerProcess, innocent: Innocent) -> None:
    host, _, port = target.address.rpartition(":")

    async def connect(number: int) -> None:
        with suppress(OSError):
            writer = (await asyncio.open_connection(host, int(port)))[1]
            await anyio.sleep(0.05)
            writer.transport.abort()

    async with attacked(target, innocent) as figures:
        await waves(2000 * FACTOR, 300, connect)
    assert figures.grown < 2 * ALLOWANCE  # 256 handshakes that are begun


async def test_handshakes_that_stall(target: ServerProcess, innocent: Innocent) -> None:
    host, _, port = target.address.rpartition(":")

    async def stall(number: int) -> None:
        with suppress(OSError):
            writer = (await asyncio.open_connection(host, int(port)))[1]
            writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01"[: 1 + number % 8])  # a ClientHello's beginning
            await anyio.sleep(0.5)
            writer.transport.abort()

    async with attacked(target, innocent) as figures:
        await waves(400 * FACTOR, 200, stall)
    assert figures.grown < 2 * ALLOWANCE  # as many


@pytest.mark.parametrize("addresses", [1, 200])
async def test_handshakes_of_strangers(target: ServerProcess, innocent: Innocent, addresses: int) -> None:
    """Whole ones: the server's arithmetic, for a certificate that it then refuses."""
    files = target.files("stranger")
    context = ssl.create_default_context(cafile=files["ca"])
    context.load_cert_chain(files["cert"], files["key"])
    host, _, port = target.address.rpartition(":")

    async def shake(number: int) -> None:
        own = (f"127.0.1.{1 + number % addresses}", 0)
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(
                host, int(port), ssl=context, server_hostname="localhost", local_addr=own
            )
            with suppress(OSError):
                await reader.read()
            writer.transport.abort()

    async with attacked(target, innocent) as figures:
        await waves(200 * FACTOR, 100 if addresses == 1 else 200, shake)
    assert figures.grown < ALLOWANCE


async def test_headers_that_come_slowly(target: ServerProcess, innocent: Innocent) -> None:
    async def dribble(_: int) -> None:
        async with tls_peer(target) as peer:
            peer.writer.write(frame(1, b"", stream=1))
            for _ in range(10):
                peer.writer.write(frame(9, b"\0", stream=1))
                await anyio.sleep(0.05)

    async with attacked(target, innocent) as figures:
        await waves(50 * FACTOR, 50, dribble)
    assert figures.grown < ALLOWANCE


async def test_a_message_of_200_mib(target: ServerProcess, innocent: Innocent) -> None:
    async with attacked(target, innocent) as figures:
        async with tls_peer(target) as peer:
            await peer.request(START, b"\0" + struct.pack("!I", 200 * MIB), end=False)
            await pour(peer, frame(0, bytes(16384), stream=1), 1280 * FACTOR)
        async with tls_peer(target) as peer:  # one that is not said to be long
            await peer.request(START, b"\0" + struct.pack("!I", 4 * MIB), end=False)
            await pour(peer, frame(0, bytes(16384), stream=1), 1280 * FACTOR)
    assert figures.grown < ALLOWANCE


def bomb() -> bytes:
    """Headers of 64 MiB in 16 KiB: one entry of the table, 4,000 bytes, and 16,000 times its number (RFC 7541 section 7.3)."""
    block = Encoder().encode([("x", "a" * 3900)], huffman=False)
    return frame(1, block, flags=0, stream=1) + frame(9, b"\xbe" * 16000, flags=4, stream=1)


def settings(codes: range) -> bytes:
    return frame(4, b"".join(struct.pack("!HI", code, code) for code in codes))


def call(stream: int, *, path: bool = True) -> bytes:
    """Headers that need no table; without a path they are malformed, and the stream is closed at once."""
    fields = [(":path", QUERY), *HEADERS] if path else HEADERS
    return frame(1, Encoder().encode([(*one, True) for one in fields], huffman=False), flags=4, stream=stream)


FLOODS = {
    "HPACK bombs": (bomb(), 1),
    "CONTINUATION": (frame(1, b"", stream=1) + frame(9, b"", stream=1) * 1000, 10),
    "CONTINUATION, long": (frame(1, b"", stream=1) + frame(9, b"\0" * 16000, stream=1) * 100, 1),
    "PING": (frame(6, bytes(8)) * 1000, 100),
    "SETTINGS": (frame(4, struct.pack("!HI", 1, 0) + struct.pack("!HI", 3, 7)) * 500, 100),
    "unknown settings": (b"".join(settings(range(at, at + 2000)) for at in range(16, 64000, 2000)), 2),
    "windows that are resized": (
        b"".join(call(number) for number in range(1, 200, 2))
        + (frame(4, struct.pack("!HI", 4, 1)) + frame(4, struct.pack("!HI", 4, 70000))) * 500,
        1,
    ),
    "streams that are closed": (b"".join(call(number, path=False) for number in range(1, 24000, 2)), 1),
    "PRIORITY": (frame(2, bytes(4) + b"\x0f", stream=9) * 1000, 100),
    "WINDOW_UPDATE": (frame(8, b"\0\0\0\1") * 1000, 100),
    "unknown frames": (frame(0xEE, b"future") * 1000, 100),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOODS)
@pytest.mark.parametrize("read", [True, False], ids=["reading", "not reading"])
async def test_floods_of_frames(target: ServerProcess, innocent: Innocent, name: str, read: bool) -> None:
    data, times = FLOODS[name]

    async def flood(_: int) -> None:
        async with tls_peer(target) as peer:
            await pour(peer, data, times, read=read)

    async with attacked(target, innocent) as figures:
        await waves(5 * FACTOR, 5, flood)
    assert figures.grown < ALLOWANCE


async def test_calls_that_are_reset_at_once(target: ServerProcess, innocent: Innocent) -> None:
    block = Encoder().encode([(":path", QUERY), *HEADERS])
    # The block repeats as it is: its second use is of the table that the first one filled, and means the same.
    again = Encoder().encode([(":path", QUERY), *HEADERS], huffman=False)

    async def reset(_: int) -> None:
        async with tls_peer(target) as peer:
            data = b"".join(
                frame(1, block if stream == 1 else again, flags=4, stream=stream) + frame(3, bytes(4), stream=stream)
                for stream in range(1, 8001, 2)
            )
            await pour(peer, data, 1)

    async with attacked(target, innocent) as figures:
        await waves(5 * FACTOR, 5, reset)
    assert figures.grown < ALLOWANCE


async def test_answers_that_are_never_read(target: ServerProcess, innocent: Innocent) -> None:
    async with target.client() as admin:
        job = await admin.start("yes", limits=LIMITS)
        request = official()["jobrunner.v1.JobSubscriptionRequest"](job_id=job.job_id).SerializeToString()

        async def subscribe(_: int) -> None:
            async with tls_peer(target) as peer:
                await peer.receive()
                for _ in range(100):
                    await peer.request(SUBSCRIBE, framed(request))
                peer.pause()
                await anyio.sleep(1)

        async with attacked(target, innocent) as figures:
            await waves(5 * FACTOR, 5, subscribe)
        await job.stop(grace=0)
    assert figures.grown < 2 * ALLOWANCE * max(1, FACTOR // 2)  # 500 streams that are there


async def test_garbage_for_messages(target: ServerProcess, innocent: Innocent) -> None:
    chance = random.Random(9113)

    async def send(_: int) -> None:
        async with tls_peer(target) as peer:
            for _ in range(100):
                data = chance.randbytes(chance.randrange(200))
                told = await peer.status(await peer.request(chance.choice([QUERY, START]), framed(data)))
                assert told[0] in ("3", "5", "8", "12")
                if told[0] == "8":  # past max_calls_per_second, and who goes on all the same loses the connection
                    await anyio.sleep(0.1)

    async with attacked(target, innocent) as figures:
        await waves(5 * FACTOR, 5, send)
    assert figures.grown < ALLOWANCE


async def test_errors_that_are_all_different_fill_no_table_of_headers(target: ServerProcess, innocent: Innocent) -> None:
    async with attacked(target, innocent) as figures, tls_peer(target) as peer:
        peer.h2.update_settings({1: (1 << 32) - 1})  # HEADER_TABLE_SIZE
        for number in range(300 * FACTOR):
            request = official()["jobrunner.v1.JobQueryRequest"](job_id=f"{number}" * 50).SerializeToString()
            assert (await peer.status(await peer.request(QUERY, framed(request))))[0] in ("5", "8")
    assert figures.grown < ALLOWANCE


async def test_five_hundred_followers_all_have_every_byte(target: ServerProcess, innocent: Innocent) -> None:
    told, lines = [], 20_000 * FACTOR
    async with target.client() as admin:
        job = await admin.start("/bin/sh", "-c", f"sleep 2; seq {lines}", limits=LIMITS)

        async def follow(client: int) -> None:
            async with target.client("viewer") as own, anyio.create_task_group() as readers:
                for _ in range(100):
                    readers.start_soon(read, own)

        async def read(own: object) -> None:
            async with own.get(job.job_id).log() as output:  # type: ignore[attr-defined]
                told.append(zlib.crc32(b"".join([part.data async for part in output if isinstance(part, Chunk)])))

        async with attacked(target, innocent) as figures:
            await waves(5, 5, follow)
    assert len(told) == 500
    assert set(told) == {zlib.crc32(b"".join(b"%d\n" % number for number in range(1, lines + 1)))}
    assert figures.grown < 2 * ALLOWANCE
