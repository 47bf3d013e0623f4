"""Every bound is told by its name, with the status RESOURCE_EXHAUSTED, and the SDK does what can be done about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import pytest
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, StreamReset

from jobrunner.bounds import Bounds
from jobrunner.client import JobClient
from jobrunner.errors import LimitReached, Timeout
from jobrunner.runner import JobRunner
from tests.support.http2 import HEADERS, RawPeer, framed, raw_peer
from tests.support.server import Running, eventually, failure, message, serving, start, subscribe, unary
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

QUERY = "/jobrunner.v1.JobService/QueryStatus"
START = "/jobrunner.v1.JobService/Start"
HEALTH = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
RESOURCE_EXHAUSTED, NOT_FOUND, OK = "8", "5", "0"
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def client(running: Running, user: str = "admin", timeout: float = 30.0) -> JobClient:
    pair = running.pair(user, user)
    return JobClient(running.address, ca=running.authority.pem, cert=pair.cert, key=pair.key, timeout=timeout)


async def goaway(peer: RawPeer) -> tuple[int, bytes]:
    """The code and the reason with which the server ends the connection."""
    with anyio.fail_after(10):
        while not peer.lost:
            for event in await peer.receive():
                if isinstance(event, ConnectionTerminated):
                    return int(event.error_code or 0), event.additional_data or b""
    pytest.fail("the connection was lost without GOAWAY")


@pytest.mark.parametrize("path", [QUERY, "/JobService/QueryStatus", HEALTH])
async def test_calls_that_come_too_fast_are_told_when_to_come_again(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path, max_calls_per_second=0.5) as running, raw_peer(running) as peer:
        told = [await peer.status(await peer.request(path, framed(b""))) for _ in range(6)]
        assert RESOURCE_EXHAUSTED not in [status for status, _ in told[:5]]
        status, text = told[5]
        assert status == RESOURCE_EXHAUSTED
        assert text.startswith(
            f'cannot call {path.rpartition("/")[2]}: user "admin" makes more than 0.5 calls a second; try again in'
        )
        assert text.endswith(" s (max_calls_per_second)")
        async with raw_peer(running, "viewer") as other:  # another user's bucket is another one
            assert (await other.status(await other.request(path, framed(b""))))[0] in (OK, NOT_FOUND)


async def test_an_official_client_is_told_the_pause_by_the_trailer_it_knows(tmp_path: Path) -> None:
    async with serving(tmp_path, max_calls_per_second=0.1) as running, running.channel() as channel:
        query = unary(channel, "QueryStatus", "JobInfo")
        await failure(query(message("JobQueryRequest")))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await query(message("JobQueryRequest"))
        pause = dict(caught.value.trailing_metadata() or ())["grpc-retry-pushback-ms"]
        assert 0 < int(pause) <= 10_000


async def test_who_does_not_listen_to_it_is_cut(tmp_path: Path) -> None:
    async with serving(tmp_path, max_calls_per_second=1) as running, raw_peer(running) as peer:
        for _ in range(40):
            peer.h2.send_headers(peer.h2.get_next_available_stream_id(), [(":path", QUERY), *HEADERS])
        await peer.flush()
        code, reason = await goaway(peer)
        assert code == ErrorCodes.ENHANCE_YOUR_CALM
        assert b"(max_calls_per_second)" in reason


async def test_the_sdk_waits_as_told_and_the_call_succeeds(tmp_path: Path) -> None:
    async with serving(tmp_path, max_calls_per_second=5) as running, client(running) as own:
        with anyio.fail_after(30):
            for _ in range(60):
                await own.server()


async def test_the_sdk_gives_up_when_the_wait_is_longer_than_its_deadline(tmp_path: Path) -> None:
    async with serving(tmp_path, max_calls_per_second=0.1) as running, client(running, timeout=1) as own:
        await own.server()
        with anyio.fail_after(10), pytest.raises(LimitReached, match=r"\(max_calls_per_second\)") as caught:
            await own.server()
        assert caught.value.bound == "max_calls_per_second"
        assert caught.value.retry_after > 1


async def test_starts_have_a_rate_of_their_own(tmp_path: Path) -> None:
    async with serving(tmp_path, max_starts_per_second=0.1) as running, running.channel() as channel:
        await start(channel, "/bin/true")
        code, text = await failure(unary(channel, "Start", "JobStartResponse")(message("JobStartRequest", command="/bin/true")))
        assert (code, "(max_starts_per_second)" in text) == (EXHAUSTED, True)
        assert len(await running.runner.list()) == 1


async def test_one_user_may_run_so_many_jobs_and_the_others_are_not_counted(tmp_path: Path) -> None:
    async with serving(tmp_path, runner={"max_running_per_user": 1}) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/sleep", "60")
        code, text = await failure(unary(channel, "Start", "JobStartResponse")(message("JobStartRequest", command="/bin/true")))
        assert code is EXHAUSTED
        assert text == 'cannot start job: 1 jobs of user "admin" are running; stop one (max_running_per_user)'
        async with running.channel(running.pair("other", "admin")) as other:
            await start(other, "/bin/true")
        await unary(channel, "Stop", "JobStopResponse")(message("JobStopRequest", job_id=job_id))
        await start(channel, "/bin/true")


async def test_a_log_has_so_many_followers_and_a_place_is_free_again(tmp_path: Path) -> None:
    async with serving(tmp_path, max_followers_per_job=2) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/sh", "-c", "echo hi; exec sleep 60")
        followers = [subscribe(channel, job_id=job_id) for _ in range(2)]
        for follower in followers:
            assert (await follower.read()).stdout == b"hi\n"
        code, text = await failure(_first(subscribe(channel, job_id=job_id)))
        assert code is EXHAUSTED
        assert text == f"cannot read log of job {job_id}: 2 clients are reading it (max_followers_per_job)"
        followers[0].cancel()
        await eventually(lambda: len(running.server._calls()) == 1)
        assert (await _first(subscribe(channel, job_id=job_id))).stdout == b"hi\n"
        followers[1].cancel()


async def _first(call: Any) -> Any:
    return await call.read()


async def test_a_user_has_so_many_calls_at_once_on_all_connections_together(tmp_path: Path) -> None:
    async with serving(tmp_path, max_calls_per_user=2) as running, raw_peer(running) as one, raw_peer(running) as other:
        waiting = await one.request(QUERY, end=False)
        await other.request(QUERY, end=False)
        await eventually(lambda: running.server.calls == 2)
        status, text = await other.status(await other.request(QUERY, framed(b"")))
        assert (status, text) == (RESOURCE_EXHAUSTED, 'cannot read request: user "admin" has 2 calls at once (max_calls_per_user)')
        async with raw_peer(running, "viewer") as third:
            assert (await third.status(await third.request(QUERY, framed(b""))))[0] == NOT_FOUND
        one.h2.reset_stream(waiting)
        await one.flush()
        await eventually(lambda: running.server.calls == 1)
        assert (await other.status(await other.request(QUERY, framed(b""))))[0] == NOT_FOUND


async def test_a_user_has_so_many_connections_and_is_told_in_goaway(tmp_path: Path) -> None:
    async with serving(tmp_path, max_connections_per_user=1) as running, raw_peer(running) as peer:
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND
        async with raw_peer(running) as second:
            assert await goaway(second) == (
                ErrorCodes.ENHANCE_YOUR_CALM,
                b'cannot connect: user "admin" has 1 connections (max_connections_per_user)',
            )
        async with client(running) as own:
            with anyio.fail_after(20), pytest.raises(LimitReached, match='user "admin" has 1 connections') as caught:
                await own.list()
            assert caught.value.bound == "max_connections_per_user"
        async with raw_peer(running, "viewer") as other:
            assert (await other.status(await other.request(QUERY, framed(b""))))[0] == NOT_FOUND


async def test_headers_that_are_too_long_are_the_end_of_their_call(tmp_path: Path) -> None:
    async with serving(tmp_path, max_header_size=8192) as running, raw_peer(running) as peer:
        stream = await peer.request(QUERY, framed(b""), headers=(("x-long", "a" * 9000),))
        status, text = await peer.status(stream)
        assert status == RESOURCE_EXHAUSTED
        assert text.startswith("cannot read request: its headers of ")
        assert text.endswith(" bytes are longer than 8192 (max_header_size)")
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND


async def test_headers_four_times_too_long_are_the_end_of_the_connection(tmp_path: Path) -> None:
    async with serving(tmp_path, max_header_size=4096) as running, raw_peer(running) as peer:
        await peer.request(QUERY, framed(b""), headers=tuple((f"x-{number}", "a" * 4000) for number in range(5)))
        assert (await goaway(peer))[0] == ErrorCodes.ENHANCE_YOUR_CALM


async def test_calls_too_many_at_once_are_refused_one_by_one(tmp_path: Path) -> None:
    async with serving(tmp_path, max_streams_per_connection=2) as running, raw_peer(running) as peer:
        await peer.receive()
        peer.h2.remote_settings.max_concurrent_streams = 100  # a client that does not care
        peer.h2.remote_settings.acknowledge()
        streams = [await peer.request(QUERY, end=False) for _ in range(3)]
        reset = None
        with anyio.fail_after(10):
            while reset is None:
                reset = next((event for event in await peer.receive() if isinstance(event, StreamReset)), None)
        assert (reset.stream_id, reset.error_code) == (streams[2], ErrorCodes.REFUSED_STREAM)
        peer.h2.send_data(streams[0], framed(b""), end_stream=True)
        await peer.flush()
        assert (await peer.status(streams[0]))[0] == NOT_FOUND


async def test_a_message_that_does_not_come_ends_its_call(tmp_path: Path) -> None:
    async with serving(tmp_path, receive_timeout=0.2) as running, raw_peer(running) as peer:
        stream = await peer.request(QUERY, framed(bytes(100))[:50], end=False)
        assert await peer.status(stream) == (
            RESOURCE_EXHAUSTED,
            "cannot read request: its message is not there after 0.2 s (receive_timeout)",
        )


async def test_messages_under_way_are_so_long_together_for_each_user(tmp_path: Path) -> None:
    """Said to be long, and not there: as many as hold what a user may, then none, until one of them is over."""
    begun = framed(bytes(1000))[:100]
    async with serving(tmp_path, max_message=1000, max_messages_per_user=3000) as running, raw_peer(running) as peer:
        streams = [await peer.request(QUERY, begun, end=False) for _ in range(3)]
        more = await peer.status(await peer.request(QUERY, begun, end=False))
        assert more == (
            RESOURCE_EXHAUSTED,
            'cannot read request: the messages of user "admin" that are under way are longer than 3000 bytes together; '
            "try again in 1 s (max_messages_per_user)",
        )
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND
        async with raw_peer(running, "viewer") as other:
            stream = await other.request(QUERY, begun, end=False)
            other.h2.send_data(stream, bytes(905), end_stream=True)
            await other.flush()
            assert (await other.status(stream))[0] == "3", "nothing of that is a message, but it was read"
        peer.h2.reset_stream(streams[0])
        await peer.flush()
        await eventually(lambda: running.server._shared.held["admin"] == 2000)
        assert (await peer.status(await peer.request(QUERY, framed(bytes(1000)))))[0] == "3"
        for stream in streams[1:]:
            peer.h2.reset_stream(stream)
        await peer.flush()
        await eventually(lambda: not running.server._shared.held)


async def test_who_follows_holds_its_message_as_long_as_it_follows(tmp_path: Path) -> None:
    async with serving(tmp_path, max_message=2000) as running, running.channel() as channel, raw_peer(running) as peer:
        job_id = await start(channel, "sleep", "60")
        unknown = bytes([0xFA, 0x7F, 0xDC, 0x0B]) + bytes(1500)
        follow = framed(message("JobSubscriptionRequest", job_id=job_id).SerializeToString() + unknown)
        for _ in range(10):
            await peer.request("/jobrunner.v1.JobService/SubscribeOutput", follow)
        await eventually(lambda: running.server._shared.held["admin"] > 8 * 1500)
        assert running.server._shared.held["admin"] <= 8 * 2000


async def test_of_one_user_s_starts_few_are_made_at_once(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, max_starts_per_user=3) as running,
        running.channel(running.pair("mallory", "admin")) as many,
        running.channel() as one,
    ):
        most, under_way = 0, running.runner._starts.under_way
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(start, many, "true")
            await eventually(lambda: under_way["mallory"] == 3)
            await start(one, "true")
            assert running.server._calls(), "its start did not wait for all of theirs"
            while running.server._calls():
                most = max(most, under_way["mallory"])
                await anyio.lowlevel.checkpoint()
        assert 1 < most <= 3


async def test_a_start_that_is_reset_has_its_place_until_it_is_over(tmp_path: Path) -> None:
    async with serving(tmp_path, max_starts_per_user=3) as running, raw_peer(running) as peer:
        request = framed(message("JobStartRequest", command="true").SerializeToString())
        most, under_way = 0, running.runner._starts.under_way

        def none_under_way() -> bool:
            nonlocal most
            most = max(most, under_way["admin"])
            return not under_way.total()

        for _ in range(30):
            peer.h2.reset_stream(await peer.request(START, request))
            await peer.flush()
            for _ in range(10):
                none_under_way()
                await anyio.lowlevel.checkpoint()
        await eventually(none_under_way)
        assert 1 <= most <= 3
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND


async def test_a_message_of_a_stream_that_has_begun_has_to_be_there_in_time(tmp_path: Path) -> None:
    """One that never ends, in frames of a byte each; between its messages the call may be silent."""
    request = framed(invocation())
    async with serving(tmp_path, receive_timeout=1) as running, raw_peer(running) as peer:
        for begun in (request[:3], request[:7]):
            stream = await peer.request(REFLECTION, request, end=False)
            await anyio.sleep(1.2)
            for at in range(len(begun)):
                peer.h2.send_data(stream, begun[at : at + 1])
            await peer.flush()
            assert await peer.status(stream) == (
                RESOURCE_EXHAUSTED,
                "cannot read request: its message is not there after 1 s (receive_timeout)",
            )


def invocation() -> bytes:
    """A request of reflection: list the services (field 7)."""
    return bytes([0x3A, 1, 0x2A])


async def test_a_request_has_so_many_fields(tmp_path: Path) -> None:
    async with serving(tmp_path, max_fields=256) as running, running.channel() as channel, client(running) as own:
        many = unary(channel, "Start", "JobStartResponse")(message("JobStartRequest", command="true", args=["x"] * 256))
        reason = "cannot call Start: cannot parse JobStartRequest: it has more than 256 fields (max_fields)"
        assert await failure(many) == (EXHAUSTED, reason)
        with pytest.raises(LimitReached) as caught:
            await own.start("true", *["x"] * 256)
        assert caught.value.bound == "max_fields"
        await own.start("true", *["x"] * 250)


async def test_so_many_lists_of_a_user_are_made_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, max_searches_per_user=1) as running, client(running) as own, client(running, "viewer") as other:
        begun, held = 0, anyio.Event()

        async def loaded(runner: JobRunner) -> None:
            nonlocal begun
            begun += 1
            await held.wait()

        monkeypatch.setattr(JobRunner, "loaded", loaded)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(own.list)
            await eventually(lambda: begun == 1)
            async with client(running, timeout=0.5) as impatient:
                with pytest.raises(Timeout):
                    await impatient.list()
            assert begun == 1
            tasks.start_soon(other.list)
            await eventually(lambda: begun == 2)
            held.set()


async def test_a_user_sends_so_many_small_frames(tmp_path: Path) -> None:
    ping = b"\0\0\x08\x06\0\0\0\0\0" + bytes(8)
    async with serving(tmp_path, max_frames_per_second=100) as running, raw_peer(running) as peer:
        peer.writer.write(ping * 400)
        assert await goaway(peer) == (
            ErrorCodes.ENHANCE_YOUR_CALM,
            b"cannot go on: more than 100 small frames a second (max_frames_per_second)",
        )
    async with serving(tmp_path / "more") as running, raw_peer(running) as peer:
        peer.writer.write(ping * 400)
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND


async def test_a_peer_may_leave_so_many_answers_unread(tmp_path: Path) -> None:
    """As few as it may by default are the end of a connection: tests of connections."""
    pings = (b"\0\0\x08\x06\0\0\0\0\0" + bytes(8)) * 10_000
    async with serving(tmp_path, max_unread_answers=1 << 30, max_calls_per_second=1_000_000) as running, raw_peer(running) as peer:
        await eventually(lambda: running.server.connections == 1)
        (protocol,) = running.server._connections
        peer.pause()
        with fail_after(30):
            while protocol._unread <= Bounds().max_unread_answers:
                peer.writer.write(pings)
                await peer.writer.drain()
        assert not protocol.transport.is_closing()
