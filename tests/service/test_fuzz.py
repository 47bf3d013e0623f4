"""Every request message, made from the descriptors, whole and broken, against a live server: only statuses that are declared.

Nothing is answered with UNKNOWN or INTERNAL, the server lives, and no job is there that no valid start has asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.attack import FACTOR, tls_peer
from tests.support.daemon import ServerProcess, server_process
from tests.support.http2 import framed
from tests.support.protobuf import official
from tests.support.timing import fail_after

pytestmark = [pytest.mark.requires("root"), pytest.mark.timeout(60 * FACTOR)]

PACKAGED = "/jobrunner.v1.JobService/"
REQUESTS = {
    "Start": "JobStartRequest",
    "Stop": "JobStopRequest",
    "QueryStatus": "JobQueryRequest",
    "SubscribeOutput": "JobSubscriptionRequest",
    "Wait": "JobWaitRequest",
    "List": "JobListRequest",
    "Watch": "JobWatchRequest",
    "Remove": "JobRemoveRequest",
    "WriteInput": "JobInputRequest",
    "GetServer": "GetServerRequest",
    "ListWorkspaces": "ListWorkspacesRequest",
    "RemoveWorkspace": "RemoveWorkspaceRequest",
}
CALLS = {
    **{PACKAGED + name: f"jobrunner.v1.{message}" for name, message in REQUESTS.items()},
    **{f"/JobService/{name}": f"jobrunner.v1.{REQUESTS[name]}" for name in ("Start", "Stop", "QueryStatus", "SubscribeOutput")},
    "/grpc.health.v1.Health/Check": "grpc.health.v1.HealthCheckRequest",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": "grpc.reflection.v1.ServerReflectionRequest",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "grpc.reflection.v1.ServerReflectionRequest",
}
COMMAND = b"\x0a\x0c/nonexistent"
"""Field 1 of a start: what comes after it may make it valid, up to the command that is not there."""
DECLARED = {"0", "3", "5", "6", "8", "9", "11", "12"}
"""OK, INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, OUT_OF_RANGE, UNIMPLEMENTED."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(tmp_path_factory.mktemp("fuzzed")) as running:
        yield running


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


INTEGERS = st.one_of(
    st.integers(0, 3), st.sampled_from([(1 << n) - 1 for n in (7, 31, 32, 53, 63, 64)]), st.integers(0, (1 << 64) - 1)
)
TEXTS = st.one_of(
    st.sampled_from(
        [b"", b"/nonexistent", b"none", b"TERM", b"\0", b"../..", b"\xff", b"\xed\xa0\x80", b"a" * 300, "snö☃".encode()]
    ),
    st.binary(max_size=40),
)
"""No command is one that exists: a start that is valid all the same fails, and leaves nothing."""


def value_of(field: Any, depth: int) -> st.SearchStrategy[bytes]:
    """Tag and value, of the right wire type most of the time."""
    number = field.number
    plain = INTEGERS.map(lambda value: varint(number << 3) + varint(value))
    fixed = st.binary(min_size=8, max_size=8).map(lambda data: varint(number << 3 | 1) + data)
    short = st.binary(min_size=4, max_size=4).map(lambda data: varint(number << 3 | 5) + data)
    inner = message_of(field.message_type, depth + 1) if field.message_type is not None and depth < 3 else TEXTS
    length = inner.map(lambda data: varint(number << 3 | 2) + varint(len(data)) + data)
    right = {
        FieldDescriptor.CPPTYPE_STRING: length,
        FieldDescriptor.CPPTYPE_MESSAGE: length,
        FieldDescriptor.CPPTYPE_DOUBLE: fixed,
    }.get(field.cpp_type, plain)
    return st.one_of(right, right, right, right, st.sampled_from([plain, fixed, short, length]).flatmap(lambda wrong: wrong))


def unknown() -> st.SearchStrategy[bytes]:
    number = st.one_of(st.integers(50, 1 << 29), st.sampled_from([0, (1 << 29) - 1]))
    return st.tuples(number, st.integers(0, 7), st.binary(max_size=10)).map(lambda one: varint(one[0] << 3 | one[1]) + one[2])


def message_of(descriptor: Any, depth: int = 0) -> st.SearchStrategy[bytes]:
    fields = [value_of(field, depth) for field in descriptor.fields]
    return st.lists(st.one_of(*fields, *fields, unknown()) if fields else unknown(), max_size=6).map(b"".join)


@st.composite
def broken(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """As it is; cut off; with bytes changed; or none at all."""
    data = draw(whole)
    kind = draw(st.sampled_from(["whole", "whole", "cut", "changed", "noise"]))
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if kind == "changed" and data:
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + draw(st.binary(min_size=1, max_size=3)) + data[at + 1 :]
    return draw(st.binary(max_size=60)) if kind == "noise" else data


async def statuses(server: ServerProcess, path: str, messages: list[bytes]) -> list[tuple[str, str]]:
    async with tls_peer(server) as peer:
        return [await peer.status(await peer.request(path, framed(data))) for data in messages]


@pytest.mark.parametrize("path", CALLS)
def test_only_declared_statuses(target: ServerProcess, path: str) -> None:
    """One connection for each list: the same that is wrong in one message must not reach the next."""

    @settings(
        max_examples=8 * FACTOR, deadline=None, database=None, derandomize=FACTOR == 1, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(broken(message_of(official()[CALLS[path]].DESCRIPTOR)), min_size=5, max_size=10))
    def attack(messages: list[bytes]) -> None:
        if path.endswith("/Start"):
            messages += [COMMAND + data for data in messages]
        told = asyncio.run(statuses(target, path, messages))
        assert [one for one in told if one[0] not in DECLARED] == []

    attack()
    assert target.process.poll() is None
    assert b"internal error" not in target.log
    assert b"Traceback" not in target.log


async def test_nothing_was_started(target: ServerProcess) -> None:
    """Runs after the others of this file, on their server."""
    async with target.client() as client:
        assert await client.list() == []
    assert list(Path(target.state, "jobs").iterdir()) == []


def test_every_call_is_fuzzed() -> None:
    from jobrunner.server.auth import POLICY

    assert set(POLICY) - set(CALLS) == {"/grpc.health.v1.Health/Watch"}  # it never ends; its request is Check's


@pytest.mark.parametrize("timeout", ["99999999H", "1n", "0H", "00000000n", "99999999n", "1u", "1H"])
async def test_deadlines_of_any_length(target: ServerProcess, timeout: str) -> None:
    async with tls_peer(target) as peer:
        told = await peer.status(await peer.request(PACKAGED + "QueryStatus", framed(b""), headers=(("grpc-timeout", timeout),)))
        assert told[0] in ("4", "5")


@pytest.mark.parametrize("timeout", ["", "H", "-1S", "1", "1s", "1.5S", "123456789S", "0x1S", "\u0661S"])
async def test_deadlines_that_are_none(target: ServerProcess, timeout: str) -> None:
    async with tls_peer(target) as peer:
        headers = (("grpc-timeout", timeout),)
        told = await peer.status(await peer.request(PACKAGED + "QueryStatus", framed(b""), headers=headers))
        assert told[0] in ("3", "")  # or no header that may be sent at all


async def test_calls_that_are_cancelled_leave_nothing(target: ServerProcess) -> None:
    async with target.client() as client:
        job = await client.start("/bin/sleep", "100")
        descriptors = Path(f"/proc/{target.process.pid}/fd")
        before = len(list(descriptors.iterdir()))
        request = official()["jobrunner.v1.JobSubscriptionRequest"](job_id=job.job_id).SerializeToString()
        async with tls_peer(target) as peer:
            await peer.receive()
            for number in range(200):
                path = PACKAGED + ("SubscribeOutput", "Wait")[number % 2]
                stream = await peer.request(path, framed(request))
                if number % 3 == 0:  # so that the call is at work, and not only asked for
                    assert (await peer.status(await peer.request("/grpc.health.v1.Health/Check", framed(b""))))[0] == "0"
                peer.h2.reset_stream(stream)
                await peer.flush()
            assert (await peer.status(await peer.request(PACKAGED + "GetServer", framed(b""))))[0] == "0"
            with fail_after(20):  # a thread that was opening a log for one of them closes it when it is done
                while len(list(descriptors.iterdir())) > before + 1:  # noqa: ASYNC110  # another process tells nobody
                    await asyncio.sleep(0.01)
        assert (await job.info()).status == "running"
        await job.stop(grace=0)
        await client.remove(job.job_id)
