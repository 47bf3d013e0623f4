"""What is no call, or no message, has one clear answer: never UNKNOWN, never silence, and the connection goes on."""

from __future__ import annotations

import logging
from pathlib import Path

import anyio
import grpc
import pytest

from tests.support.http2 import framed, raw_peer
from tests.support.server import failure, message, serving, unary

pytestmark = pytest.mark.requires("root")

QUERY = "/jobrunner.v1.JobService/QueryStatus"
START = "/jobrunner.v1.JobService/Start"
INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, UNIMPLEMENTED, DEADLINE_EXCEEDED = "3", "5", "8", "12", "4"

BAD = {
    "garbage": (framed(b"\xff\xff\xff"), INVALID_ARGUMENT, "cannot call QueryStatus: message: cannot parse JobQueryRequest: "),
    "wrong wire type": (framed(b"\x08\x05"), INVALID_ARGUMENT, "cannot call QueryStatus: message: cannot parse JobQueryRequest: "),
    "truncated field": (framed(b"\x0a\x0cabc"), INVALID_ARGUMENT, "cannot call QueryStatus: message: cannot parse "),
    "not UTF-8": (framed(b"\x0a\x01\xff"), INVALID_ARGUMENT, "cannot call QueryStatus: message: cannot parse JobQueryRequest: "),
    "no message": (b"", INVALID_ARGUMENT, "cannot read request: message: there is none"),
    "half a prefix": (b"\0\0", INVALID_ARGUMENT, "cannot read request: message: the stream ends within it"),
    "half a message": (framed(b"\x0a\x0cabcdef")[:-3], INVALID_ARGUMENT, "cannot read request: message: the stream ends within it"),
    "a prefix alone": (framed(b"abc")[:5], INVALID_ARGUMENT, "cannot read request: message: the stream ends within it"),
    "compressed": (framed(b"\x0a\x01a", compressed=True), UNIMPLEMENTED, "cannot call QueryStatus: compressed messages"),
    "no id": (framed(b""), NOT_FOUND, 'cannot find job "": no such job'),
    "no hexadecimal id": (framed(b"\x0a\x05../.."), NOT_FOUND, 'cannot find job "../..": no such job'),
}


@pytest.mark.parametrize(("data", "status", "text"), BAD.values(), ids=BAD)
async def test_what_is_no_request_is_told_so(tmp_path: Path, data: bytes, status: str, text: str) -> None:
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        code, told = await peer.status(await peer.request(QUERY, data))
        assert (code, told[: len(text)]) == (status, text)
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((("grpc-timeout", "soon"),), INVALID_ARGUMENT),
        ((("grpc-timeout", "9" * 400 + "S"),), INVALID_ARGUMENT),
        ((("grpc-timeout", "0m"),), DEADLINE_EXCEEDED),
        ((("grpc-timeout", "1n"),), DEADLINE_EXCEEDED),
    ],
    ids=["no number", "too many digits", "zero", "passed on arrival"],
)
async def test_a_deadline_that_is_none_or_has_passed_is_told(
    tmp_path: Path, headers: tuple[tuple[str, str], ...], status: str
) -> None:
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        stream = await peer.request(QUERY, end=False, headers=headers)
        assert (await peer.status(stream))[0] == status


async def test_headers_that_cannot_be_read_reset_the_call_and_not_the_connection(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        assert await peer.status(await peer.request(QUERY, end=False, headers=(("x-bin", "A"),))) == ("", "")
        assert not peer.lost
        assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == NOT_FOUND


async def test_an_unknown_method_is_unimplemented(tmp_path: Path) -> None:
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        assert (await peer.status(await peer.request("/jobrunner.v1.JobService/Reboot", framed(b""))))[0] == UNIMPLEMENTED


async def test_a_message_past_the_limit_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async with serving(tmp_path, max_message=65536) as running, raw_peer(running) as peer:
        prefix = b"\0" + (65537).to_bytes(4, "big")
        code, text = await peer.status(await peer.request(START, prefix, end=False))
        assert code == RESOURCE_EXHAUSTED
        assert text == "cannot read request: its message of 65537 bytes is longer than 65536 (max_message)"


async def test_an_official_client_is_told_of_a_message_past_the_limit(tmp_path: Path) -> None:
    async with serving(tmp_path, max_message=65536) as running, running.channel() as channel:
        with anyio.fail_after(10):
            code, _ = await failure(
                unary(channel, "Start", "JobStartResponse")(message("JobStartRequest", command="x" * 1_000_000))
            )
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_message_of_the_limit_is_read(tmp_path: Path) -> None:
    async with serving(tmp_path, max_message=65536) as running, running.channel() as channel:
        request = message("JobStartRequest", command="ls", cwd="x" * 60_000)
        request.cwd += "x" * (65536 - request.ByteSize())
        assert request.ByteSize() == 65536
        code, text = await failure(unary(channel, "Start", "JobStartResponse")(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert text.startswith("cannot start job: cwd: ")


async def test_none_of_it_is_logged_as_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as running, raw_peer(running) as peer:
        with caplog.at_level(logging.WARNING):
            for data, status, _ in BAD.values():
                assert (await peer.status(await peer.request(QUERY, data)))[0] == status
    assert caplog.records == []
