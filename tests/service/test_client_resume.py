"""Connections that break, and servers that restart, under the SDK: every byte once, and one call that goes on."""

from __future__ import annotations

import hashlib
import random
import signal
import socket
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest

from jobrunner import Gap, JobRunnerError, JobStatus, Stream, WouldBlock
from jobrunner.client import JobClient
from jobrunner.errors import JobNotFound, OffsetOutOfRange, Unavailable
from jobrunner.output import Begin, Chunk, End
from jobrunner.wire.convert import output_to_wire
from jobrunner.wire.status import error_to_wire
from tests.support.daemon import ServerProcess
from tests.support.peer import Output, peer_client
from tests.support.proxy import Proxy, proxy_to

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from jobrunner.client import ClientOutputReader

pytestmark = pytest.mark.requires("root")

JOB = "0123456789ab"
MIB = 1 << 20
TICKS = "i=0; while [ $i -lt {} ]; do i=$((i+1)); echo line $i; sleep 0.01; done"
RANDOM = "head -c {} /dev/urandom | tee /dev/stderr | sha256sum | cut -c1-64"


class Heard:
    """What a client tells of its connection."""

    def __init__(self) -> None:
        self.words: list[JobRunnerError | None] = []

    def __call__(self, error: JobRunnerError | None) -> None:
        self.words.append(error)


def client_through(proxy: Proxy, server: ServerProcess, **options: Any) -> JobClient:
    files = server.files()
    return JobClient(proxy.address, ca=files["ca"], cert=files["cert"], key=files["key"], **options)


@asynccontextmanager
async def cut_client(
    server: ServerProcess, budget: Callable[[], int | None] = lambda: None, **options: Any
) -> AsyncIterator[tuple[JobClient, Proxy]]:
    """A client whose connections go through a proxy."""
    async with proxy_to(server.address, budget) as proxy, client_through(proxy, server, **options) as client:
        yield client, proxy


@asynccontextmanager
async def private(path: Path, *options: str) -> AsyncIterator[ServerProcess]:
    """A server of one test, whose jobs all end by themselves."""
    server = await anyio.to_thread.run_sync(ServerProcess, path, *options)
    try:
        yield server
    finally:
        with anyio.CancelScope(shield=True):
            if server.process.poll() is None:
                await anyio.to_thread.run_sync(server.end)


async def digests(reader: ClientOutputReader) -> dict[Stream, bytes]:
    """What each stream has given, as a hash of it and, for stdout, as it is. Fails on a gap, and on bytes out of place."""
    hashed, out, at = hashlib.sha256(), b"", reader.offset
    async with reader:
        async for part in reader:
            assert isinstance(part, Chunk)
            assert part.offset == at
            at = part.next_offset
            if part.stream is Stream.STDOUT:
                out += part.data
            else:
                hashed.update(part.data)
    assert reader.end is not None
    assert reader.end.total_bytes == at
    return {Stream.STDOUT: out, Stream.STDERR: hashed.hexdigest().encode() + b"\n"}


async def test_every_byte_once_through_connections_that_are_cut_again_and_again(server: ServerProcess) -> None:
    cuts = random.Random(5)
    heard = Heard()
    with anyio.fail_after(50):
        async with server.client() as direct:
            job = await direct.start("sh", "-c", RANDOM.format(24 * MIB))
            async with cut_client(server, lambda: cuts.randint(20_000, 600_000), tell=heard) as (client, proxy):
                said = await digests(client.get(job.job_id).log())
    assert said[Stream.STDOUT] == said[Stream.STDERR]
    assert proxy.cuts > 20
    assert len(heard.words) >= 2 * 20
    assert all(isinstance(word, Unavailable) for word in heard.words[::2])
    assert not any(heard.words[1::2])


async def test_the_last_lines_of_two_streams_are_the_same_through_a_connection_that_is_cut(server: ServerProcess) -> None:
    script = "for i in $(seq 30000); do printf half$i >&2; echo out$i; echo 2nd$i >&2; done"
    cuts = random.Random(6)
    with anyio.fail_after(50):
        async with server.client() as direct:
            job = await direct.start("sh", "-c", script)
            await job.wait()
            expected = await lines(direct.get(job.job_id).log(tail=40_001))
            async with cut_client(server, lambda: cuts.randint(20_000, 200_000)) as (client, proxy):
                assert await lines(client.get(job.job_id).log(tail=40_001)) == expected
    assert len(expected) == 40_001
    assert proxy.cuts > 2


async def lines(reader: ClientOutputReader) -> list[tuple[int, bytes]]:
    found = []
    async with reader:
        while (line := await reader.next_line()) is not None:
            found.append((line.offset, line.data))
    return found


async def test_a_silent_job_s_follower_survives_a_cut_and_hears_of_it(server: ServerProcess) -> None:
    heard = Heard()
    with anyio.fail_after(30):
        async with cut_client(server, tell=heard) as (client, proxy):
            job = await client.start("sh", "-c", "sleep 1000")
            async with job.log() as reader, anyio.create_task_group() as tasks:
                tasks.start_soon(anext, reader, None)
                await reached(client)
                proxy.cut()
                await until(lambda: len(heard.words) == 2)
                await job.stop(grace=0)
    assert isinstance(heard.words[0], Unavailable)
    assert heard.words[1] is None


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing tells it
        await anyio.sleep(0.01)


async def reached(client: JobClient) -> None:
    """Until the reader's call is under way: one that came after it was answered."""
    for _ in range(3):
        await client.server()


@pytest.mark.parametrize("verb", ["wait", "stop"])
async def test_a_call_that_waits_for_the_end_is_repeated(server: ServerProcess, verb: str) -> None:
    with anyio.fail_after(30):
        async with server.client() as direct, cut_client(server) as (client, proxy):
            job = await client.start("sh", "-c", "trap 'sleep 1; exit 3' TERM; echo up; while :; do sleep 0.05; done")
            async with job.log() as reader:
                await anext(reader)
            told: list[tuple[JobStatus, str]] = []

            async def call() -> None:
                if verb == "wait":
                    told.append(((await job.wait()).status, ""))
                else:
                    info, text = await job.stop_told()
                    told.append((info.status, text))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
                await reached(client)
                proxy.cut()
                if verb == "wait":
                    await direct.get(job.job_id).stop()
    assert told == [(JobStatus.TERMINATED, "Job successfully stopped" if verb == "stop" else "")]


async def test_a_start_whose_answer_is_lost_happens_once(server: ServerProcess) -> None:
    label = {"case": f"{random.getrandbits(64):x}"}
    with anyio.fail_after(30):
        async with cut_client(server) as (client, proxy):
            await client.server()
            proxy.muted = True
            job: list[str] = []

            async def start() -> None:
                job.append((await client.start("true", labels=label)).job_id)

            async with anyio.create_task_group() as tasks, server.client() as direct:
                tasks.start_soon(start)
                while not (jobs := await direct.list(labels=label)):  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                proxy.muted = False
                proxy.cut()
            assert [info.job_id for info in await client.list(labels=label)] == job == [info.job_id for info in jobs]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_server_that_restarts_under_readers_and_waits(tmp_path: Path, how: signal.Signals) -> None:
    heard = Heard()
    with anyio.fail_after(55):
        async with private(tmp_path) as first, cut_client(first, tell=heard) as (client, proxy):
            job = await client.start("sh", "-c", TICKS.format(400) + "; exit 7")
            said: list[Any] = []

            async def follow() -> None:
                said.append(await digests(job.log()))

            async def wait() -> None:
                said.append((await job.wait()).exit_code)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follow)
                tasks.start_soon(wait)
                await anyio.sleep(0.5)  # somewhere in the middle
                await anyio.to_thread.run_sync(first.end, how)
                second = await anyio.to_thread.run_sync(ServerProcess, tmp_path)
                proxy.target = second.address
        await anyio.to_thread.run_sync(second.end)
    out = b"".join(b"line %d\n" % number for number in range(1, 401))
    assert next(part for part in said if isinstance(part, dict))[Stream.STDOUT] == out
    assert 7 in said
    assert [word is None for word in heard.words] == [False, True]


async def test_a_server_that_stays_away_is_told_after_the_time(server: ServerProcess) -> None:
    with anyio.fail_after(30):
        async with cut_client(server, resume_timeout=0.5) as (client, proxy):
            job = await client.start("sleep", "1000")
            async with job.log() as reader:
                proxy_cut = anyio.current_time()
                proxy.refusing = True
                proxy.cut()
                with pytest.raises(Unavailable):
                    await anext(reader)
            assert 0.5 <= anyio.current_time() - proxy_cut < 20
            proxy.refusing = False
            await job.stop(grace=0)


async def test_nothing_is_tried_again_before_the_server_was_reached_once(server: ServerProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    files = server.files()
    with anyio.fail_after(5):
        async with JobClient(address, ca=files["ca"], cert=files["cert"], key=files["key"]) as client:
            for call in (client.get(JOB).wait(), client.get(JOB).stop(), client.start("true"), anext(client.get(JOB).log())):
                with pytest.raises(Unavailable, match="Connection refused"):
                    await call


@pytest.mark.parametrize("error", [JobNotFound(JOB), OffsetOutOfRange(JOB, 9, 3)])
async def test_an_error_that_would_come_again_is_not_retried(tmp_path: Path, error: JobRunnerError) -> None:
    told, asked = error_to_wire(error), 0

    async def answer(stream: Output) -> None:
        nonlocal asked
        asked += 1
        await stream.send_trailing_metadata(status=told.status, status_message=told.message, metadata=told.trailer)

    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=answer, resume_timeout=30) as (client, _), client.get(JOB).log() as reader:
            with pytest.raises(type(error)):
                await anext(reader)
    assert asked == 1


async def test_one_that_breaks_off_before_its_first_byte_goes_on_where_it_began(tmp_path: Path) -> None:
    requests = []

    async def answer(stream: Output) -> None:
        request = await stream.recv_message()
        assert request is not None
        requests.append((request.offset, request.tail, request.since is not None))
        if len(requests) < 3:
            await stream.send_message(output_to_wire(Begin(5, 5, 9)))
            if len(requests) == 2:
                await stream.send_message(output_to_wire(Chunk(Stream.STDERR, b"567", 5, 1.0)))
            while reader._rest().offset != (5, 8)[len(requests) - 1]:  # noqa: ASYNC110 - what is on its way is lost with it
                await anyio.sleep(0.001)
            stream._stream._transport.abort()
            return
        await stream.send_message(output_to_wire(Chunk(Stream.STDERR, b"89a", 8, 1.0)))
        await stream.send_message(output_to_wire(Gap(11, 12, "dropped")))
        await stream.send_message(output_to_wire(End(13)))

    with anyio.fail_after(10):
        async with (
            peer_client(tmp_path, output=answer, resume_timeout=30) as (client, _),
            client.get(JOB).log(tail=7, since=1.5) as reader,
        ):
            parts = [part async for part in reader]
    assert requests == [(0, 7, True), (5, None, True), (8, None, False)]
    assert parts == [Chunk(Stream.STDERR, b"9a", 9, 1.0), Gap(11, 12, "dropped")]


async def test_a_caller_that_pauses_for_longer_than_the_server_waits_goes_on_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, calls = Heard(), 0

    def counted(self: JobClient) -> Any:
        nonlocal calls
        calls += 1
        return output_call(self)

    output_call = JobClient._output_call
    monkeypatch.setattr(JobClient, "_output_call", counted)
    (tmp_path / "jobrunnerd.toml").write_text("send_timeout = 0.5\n")
    with anyio.fail_after(50):
        async with (
            private(tmp_path, f"--config={tmp_path}/jobrunnerd.toml") as server,
            cut_client(server, tell=heard) as (client, _),
        ):
            job = await client.start("sh", "-c", RANDOM.format(8 * MIB))
            async with job.log() as reader:
                with pytest.raises(WouldBlock):
                    reader.next_nowait()
                await anyio.sleep(2)  # nothing is taken for four times as long as the server waits
                assert calls == 1
                said = await digests(reader)
    assert said[Stream.STDOUT] == said[Stream.STDERR]
    assert heard.words == []
    assert calls > 1
