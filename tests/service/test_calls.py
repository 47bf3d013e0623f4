"""The calls of JobService, by an official gRPC client against a real server with real jobs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import anyio
import grpc
import grpc.aio
import pytest

from tests.support.server import failure, message, serving, start, subscribe, unary

pytestmark = pytest.mark.requires("root")

SLEEP = ("/bin/sleep", "60")


async def query(channel: grpc.aio.Channel, job_id: str) -> Any:
    return await unary(channel, "QueryStatus", "JobInfo")(message("JobQueryRequest", job_id=job_id))


async def wait(channel: grpc.aio.Channel, job_id: str) -> Any:
    with anyio.fail_after(20):
        return await unary(channel, "Wait", "JobInfo")(message("JobWaitRequest", job_id=job_id))


async def stop(channel: grpc.aio.Channel, job_id: str, **fields: Any) -> Any:
    with anyio.fail_after(20):
        return await unary(channel, "Stop", "JobStopResponse")(message("JobStopRequest", job_id=job_id, **fields))


async def listed(channel: grpc.aio.Channel, **fields: Any) -> tuple[list[str], str]:
    reply = await unary(channel, "List", "JobListResponse")(message("JobListRequest", **fields))
    return [job.job_id for job in reply.jobs], reply.next_cursor


async def test_start_tells_the_id_and_who_started_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        request = message("JobStartRequest", command="/bin/sleep", args=["60"])
        request.name = "nap"
        reply = await unary(channel, "Start", "JobStartResponse")(request)
        assert len(reply.job_id) == 12
        assert (reply.info.status, reply.info.user, reply.info.name) == ("running", "admin", "nap")
        assert not reply.info.usage.ListFields()  # of a job that has just begun nobody asked, and to know it takes files
        assert (await query(channel, reply.job_id)).usage.HasField("pids")


async def test_a_start_that_fails_says_the_step_and_leaves_no_job(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        code, text = await failure(unary(channel, "Start", "JobStartResponse")(message("JobStartRequest", command="/nosuch")))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert text == 'cannot start "/nosuch": exec: No such file or directory'
        assert await listed(channel) == ([], "")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"command": ""}, "cannot start job: command: must not be empty"),
        ({"command": "ls", "args": ["\0"]}, "cannot start job: args[0]: must not contain a NUL byte"),
        ({"command": "ls", "root": "x"}, "cannot start job: root: 'x' is not in this server's configuration; there are: none"),
        (
            {"command": "ls", "network": "host"},
            "cannot start job: network: this server gives jobs no network (network_host = true in its configuration would)",
        ),
        ({"command": "ls", "stdin": True}, "cannot start job: stdin: this server does not offer it"),
    ],
)
async def test_a_request_that_cannot_be_is_refused_by_field(tmp_path: Path, fields: dict[str, Any], text: str) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        told = await failure(unary(channel, "Start", "JobStartResponse")(message("JobStartRequest", **fields)))
        assert told == (grpc.StatusCode.INVALID_ARGUMENT, text)


async def test_a_job_is_told_to_its_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/sh", "-c", "exit 3")
        info = await wait(channel, job_id)
        assert (info.status, info.end_reason, info.exit_code, info.message) == ("failed", "exited", 3, "exit code 3")
        assert await query(channel, job_id) == info


async def test_output_is_both_streams_with_offsets_and_then_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel(user="viewer") as viewer, running.channel() as channel:
        job_id = await start(channel, "/bin/sh", "-c", "echo out; sleep 0.1; echo err >&2; exit 1")
        with anyio.fail_after(20):
            messages = [part async for part in subscribe(viewer, job_id=job_id)]
        parts = [(part.stdout, part.stderr, part.offset) for part in messages]
        assert parts == [(b"out\n", b"", 0), (b"", b"err\n", 4), (b"", b"", 8)]
        assert all(part.HasField("time") for part in messages[:2])
        assert messages[-1].end.total_bytes == 8
        assert (messages[-1].end.info.status, messages[-1].end.info.exit_code) == ("failed", 1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"offset": 3}, b"def"),
        ({"offset": 6}, b""),
        ({"streams": [1]}, b"abef"),
        ({"streams": [2]}, b"cd"),
        ({"streams": [1, 2]}, b"abcdef"),
        ({"offset": 1, "streams": [1]}, b"bef"),
        ({"follow": False}, b"abcdef"),
    ],
)
async def test_a_subscription_has_the_part_that_was_asked_for(tmp_path: Path, fields: dict[str, Any], expected: bytes) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/sh", "-c", "printf ab; sleep .05; printf cd >&2; sleep .05; printf ef")
        await wait(channel, job_id)
        with anyio.fail_after(20):
            messages = [part async for part in subscribe(channel, job_id=job_id, **fields)]
        assert b"".join(part.stdout + part.stderr for part in messages) == expected
        assert messages[-1].end.total_bytes == 6


async def test_without_follow_a_running_job_is_read_to_what_is_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/sh", "-c", "echo here; exec sleep 60")
        following = subscribe(channel, job_id=job_id)
        with anyio.fail_after(20):
            assert (await following.read()).stdout == b"here\n"
            messages = [part async for part in subscribe(channel, job_id=job_id, follow=False)]
        following.cancel()
        assert [part.stdout for part in messages] == [b"here\n", b""]
        assert messages[-1].end.info.status == "running"


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"offset": 100}, grpc.StatusCode.OUT_OF_RANGE, "cannot read log of job {}: offset 100 is past its end, 0"),
        ({"offset": (1 << 64) - 1}, grpc.StatusCode.INVALID_ARGUMENT, f"cannot read log: offset: {(1 << 64) - 1} is past"),
        ({"since": {"seconds": -1}}, grpc.StatusCode.INVALID_ARGUMENT, "cannot read log: since: -1.0 is no time"),
        ({"since": {"seconds": 2}, "until": {"seconds": 1}}, grpc.StatusCode.INVALID_ARGUMENT, "cannot read log: until: is before"),
        ({"streams": [9]}, grpc.StatusCode.INVALID_ARGUMENT, "cannot read log: streams: 9 is no output stream"),
        ({"tail": 5, "offset": 1}, grpc.StatusCode.INVALID_ARGUMENT, "cannot read log: tail: cannot be combined with an offset"),
    ],
)
async def test_a_subscription_that_cannot_be_is_refused(
    tmp_path: Path, fields: dict[str, Any], code: grpc.StatusCode, text: str
) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/true")
        await wait(channel, job_id)
        call = subscribe(channel, job_id=job_id, **fields)
        with anyio.fail_after(20):
            told = await failure(call.read())
        assert told[0] is code
        assert told[1].startswith(text.format(job_id))


async def test_stop_answers_in_band_that_the_job_is_stopped(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, *SLEEP)
        reply = await stop(channel, job_id)
        assert (reply.status, reply.message) == ("stopped", "Job successfully stopped")
        info = await query(channel, job_id)
        assert (info.status, info.end_reason, info.stopped_by) == ("terminated", "stopped", "admin")


async def test_stop_of_an_ended_job_says_how_it_ended(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, "/bin/true")
        await wait(channel, job_id)
        reply = await stop(channel, job_id)
        assert (reply.status, reply.message) == ("stopped", "Job had already ended: completed, exit code 0")
        stopped = await start(channel, *SLEEP)
        await stop(channel, stopped)
        again = await stop(channel, stopped)
        assert (again.status, again.message[:40]) == ("stopped", "Job had already ended: terminated, stopp")


async def test_stop_of_no_job_is_not_found_in_band(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        reply = await stop(channel, "0123456789ab")
        assert (reply.status, reply.message) == ("not found", "Job not found")


async def test_stop_with_a_grace_that_cannot_be_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        job_id = await start(channel, *SLEEP)
        request = message("JobStopRequest", job_id=job_id)
        request.grace.seconds = -1
        code, text = await failure(unary(channel, "Stop", "JobStopResponse")(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert text == f"cannot stop job {job_id}: grace: -1.0 is not between 0 and 86400"


async def test_a_start_that_is_cancelled_by_its_client_is_not_cut_in_half(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        for delay in (0.0, 0.002, 0.005, 0.01, 0.02):
            call = unary(channel, "Start", "JobStartResponse")(message("JobStartRequest", command="/bin/true"))
            await anyio.sleep(delay)
            call.cancel()
        job_id = await start(channel, "/bin/true")
        await wait(channel, job_id)
        for other in (await listed(channel))[0]:
            assert (await wait(channel, other)).status == "completed"


async def test_the_list_is_newest_first_page_by_page(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        started = [await start(channel, "/bin/true") for _ in range(5)]
        first, cursor = await listed(channel, page_size=2)
        second, cursor = await listed(channel, page_size=2, cursor=cursor)
        newer = await start(channel, "/bin/true")
        third, last = await listed(channel, page_size=2, cursor=cursor)
        assert list(itertools.chain(first, second, third)) == started[::-1]
        assert last == ""
        assert (await listed(channel))[0] == [newer, *started[::-1]]


async def test_the_list_goes_on_after_a_job_that_was_removed(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        started = [await start(channel, "/bin/true") for _ in range(3)]
        page, cursor = await listed(channel, page_size=1)
        await wait(channel, page[0])
        await unary(channel, "Remove", "JobRemoveResponse")(message("JobRemoveRequest", job_id=page[0]))
        assert (await listed(channel, cursor=cursor))[0] == started[1::-1]


async def test_the_list_is_filtered(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        ended = await start(channel, "/bin/true", labels={"team": "a", "x": "y"})
        await wait(channel, ended)
        sleeping = await start(channel, *SLEEP, labels={"team": "a"})
        assert (await listed(channel, statuses=["running"]))[0] == [sleeping]
        assert (await listed(channel, statuses=["completed", "failed"]))[0] == [ended]
        assert (await listed(channel, labels={"team": "a"}))[0] == [sleeping, ended]
        assert (await listed(channel, labels={"team": "a", "x": "y"}))[0] == [ended]
        assert (await listed(channel, labels={"team": "b"}))[0] == []


async def test_a_page_is_bounded_in_bytes(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        big = ["x" * 100_000] * 9
        started = [await start(channel, "/bin/true", *big) for _ in range(4)]
        first, cursor = await listed(channel)
        assert first == started[:1:-1]
        assert (await listed(channel, cursor=cursor))[0] == started[1::-1]


@pytest.mark.parametrize("fields", [{"page_size": 1001}, {"cursor": "x"}, {"cursor": "e30="}, {"statuses": ["asleep"]}])
async def test_a_list_that_cannot_be_is_refused_by_field(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        code, text = await failure(unary(channel, "List", "JobListResponse")(message("JobListRequest", **fields)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert text.startswith(f"cannot list jobs: {next(iter(fields))}: ")


async def test_an_ended_job_is_removed_and_a_running_one_is_not(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, running.channel() as channel:
        remove = unary(channel, "Remove", "JobRemoveResponse")
        job_id = await start(channel, *SLEEP)
        code, text = await failure(remove(message("JobRemoveRequest", job_id=job_id)))
        assert (code, text) == (grpc.StatusCode.INVALID_ARGUMENT, f"cannot remove job: job_id: job {job_id} is running")
        await stop(channel, job_id)
        await remove(message("JobRemoveRequest", job_id=job_id))
        assert (await failure(query(channel, job_id)))[0] is grpc.StatusCode.NOT_FOUND


async def test_the_server_tells_what_it_is(tmp_path: Path) -> None:
    async with serving(tmp_path, runner={"node": "here", "max_running": 7}) as running, running.channel() as channel:
        await start(channel, *SLEEP)
        facts = await unary(channel, "GetServer", "ServerInfo")(message("GetServerRequest"))
        assert (facts.node, facts.running_jobs, facts.max_running_jobs, facts.draining) == ("here", 1, 7, False)
        assert facts.cgroup in ("v1", "hybrid", "v2")
        assert facts.defaults.memory == 1 << 30
