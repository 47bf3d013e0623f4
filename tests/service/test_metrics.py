"""What Prometheus is told, read with its own parser, and what those can do who ask for it slowly."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobrunner.errors import HostError
from jobrunner.server.scrapes import PER_ADDRESS
from tests.support.http2 import framed, raw_peer
from tests.support.server import Running, eventually, failure, message, serving, start, subscribe, unary
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

QUERY = "/jobrunner.v1.JobService/QueryStatus"
ON: dict[str, Any] = {"metrics_listen": "127.0.0.1:0"}
Samples = dict[tuple[str, ...], float]


async def ask(running: Running, request: bytes = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n") -> tuple[bytes, bytes]:
    """Head and body of the answer; both empty if there is none."""
    host, _, port = running.metrics.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        with fail_after(10):
            answer = await reader.read()
    except OSError:
        answer = b""
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


async def samples(running: Running) -> Samples:
    """Name and values of the labels, in the order of their names, to the value."""
    head, body = await ask(running)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n"), head
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


async def test_calls_jobs_output_and_refusals_are_counted(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_followers_per_job": 1, "viewer_output": False}
    async with serving(tmp_path, **ON, **limits) as running, running.channel() as channel:
        before = await samples(running)
        assert before["jobrunner_jobs_started_total",] == 0
        job = await start(channel, "/bin/sh", "-c", "echo hi; exec sleep 60")
        follower = subscribe(channel, job_id=job)
        assert (await follower.read()).stdout == b"hi\n"
        now = await samples(running)
        assert (now["jobrunner_jobs", "running"], now["jobrunner_calls_in_progress",]) == (1, 1)
        assert now["jobrunner_connections",] == 1
        assert now["jobrunner_output_sent_bytes_total",] == 3
        await failure(subscribe(channel, job_id=job).read())
        async with running.channel(user="viewer") as viewer:
            await failure(subscribe(viewer, job_id=job).read())
        follower.cancel()
        await eventually(lambda: running.server.calls == 0)
        await unary(channel, "Stop", "JobStopResponse")(message("JobStopRequest", job_id=job))
        await failure(unary(channel, "Start", "JobStartResponse")(message("JobStartRequest", command="/nonexistent")))
        name = "/jobrunner.v1.JobService/"
        await eventually(lambda: running.server.calls == 0)
        now = await samples(running)
        assert {key[1:]: value for key, value in now.items() if key[0] == "jobrunner_calls_total"} == {
            (name + "Start", "OK"): 1,
            (name + "Start", "FAILED_PRECONDITION"): 1,
            (name + "Stop", "OK"): 1,
            (name + "SubscribeOutput", "RESOURCE_EXHAUSTED"): 1,
            (name + "SubscribeOutput", "PERMISSION_DENIED"): 1,
            (name + "SubscribeOutput", "CANCELLED"): 1,
        }
        assert now["jobrunner_refusals_total", "max_followers_per_job"] == 1
        assert now["jobrunner_jobs_started_total",] == 1
        assert now["jobrunner_jobs_ended_total", "stopped", "terminated"] == 1
        assert (now["jobrunner_jobs", "running"], now["jobrunner_jobs", "terminated"]) == (0, 1)
        assert now["jobrunner_start_seconds_count",] == now["jobrunner_start_seconds_bucket", "+Inf"] == 1
        assert now["jobrunner_start_seconds_sum",] > 0
        assert now["process_resident_memory_bytes",] > 1 << 20
        assert now["jobrunner_certificate_expiry_timestamp_seconds", "server"] > time.time()
        _, body = await ask(running)
        assert job not in body.decode(), "no series of a job"
        assert "viewer" not in body.decode(), "nor of a user"


async def test_failed_handshakes_and_ended_connections_are_counted_by_their_kind(tmp_path: Path) -> None:
    async with serving(tmp_path, **ON) as running:
        host, _, port = running.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await reader.read()
        writer.close()
        async with raw_peer(running, alpn=None) as peer:
            await peer.wait_lost()
        async with raw_peer(running) as peer:
            assert (await peer.status(await peer.request("/nothing", framed(b""))))[0] == "12"
        now = await samples(running)
        assert now["jobrunner_handshake_failures_total", "not_tls"] == 1
        assert now["jobrunner_handshake_failures_total", "expired"] == 0, "told from the start, so that a rate can be seen"
        assert now["jobrunner_connections_ended_total", "alpn"] == 1
        assert now["jobrunner_no_calls_total",] == 1


async def test_who_is_slow_holds_up_nobody_and_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobrunner.server.scrapes.SECONDS", 1.0)
    async with serving(tmp_path, **ON) as running:
        host, _, port = running.metrics.rpartition(":")
        slow = [await asyncio.open_connection(host, int(port)) for _ in range(2 * PER_ADDRESS)]
        for _, writer in slow:
            writer.write(b"GET /metr")
        assert (await samples(running))["jobrunner_connections",] == 0
        async with raw_peer(running) as peer:
            assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == "5"
        with fail_after(20):
            for reader, writer in slow:
                with suppress(OSError):
                    assert await reader.read() == b""
                writer.close()


async def test_many_that_come_at_once_have_few_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come in one turn of the loop give way to each other, long before their time is over."""
    monkeypatch.setattr("jobrunner.server.scrapes.SECONDS", 60.0)
    async with serving(tmp_path, **ON) as running, AsyncExitStack() as stack:
        readers = []
        for _ in range(5):
            # As many as the kernel keeps for the server.
            for reader, writer in await asyncio.gather(*(metrics_connection(running) for _ in range(PER_ADDRESS))):
                stack.callback(writer.close)
                writer.write(b"G")
                readers.append(reader)

        def few_are_left() -> bool:
            return sum(not reader.at_eof() and reader.exception() is None for reader in readers) <= PER_ADDRESS

        await eventually(few_are_left, 20)
        assert (await samples(running))["jobrunner_connections",] == 0


async def test_a_flood_of_requests_does_not_take_the_place_of_who_asks_once(tmp_path: Path) -> None:
    """From another process, and from this address: half of them never ask to the end, half ask as fast as they are answered."""
    async with serving(tmp_path, **ON) as running:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", FLOOD, running.metrics, stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            with fail_after(30):
                await process.stdout.readline()
            for _ in range(20):
                assert ("jobrunner_connections",) in await samples(running)
            async with raw_peer(running) as peer:
                assert (await peer.status(await peer.request(QUERY, framed(b""))))[0] == "5"
        finally:
            process.kill()
            await process.wait()


FLOOD = """
import socket, sys, threading
host, _, port = sys.argv[1].rpartition(":")

def flood(said):
    opened = []
    while True:
        try:
            opened.append(socket.create_connection((host, int(port))))
            opened[-1].sendall(said)
            if len(opened) > 100:
                opened.pop(0).close()
        except OSError:
            pass

for said in (b"GET /metr", b"GET /metrics HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n") * 2:
    threading.Thread(target=flood, args=(said,), daemon=True).start()
print("flooding", flush=True)
threading.Event().wait()
"""


async def test_a_place_that_is_held_goes_to_who_comes_from_the_same_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that of another: one address cannot take the places of the others."""
    monkeypatch.setattr("jobrunner.server.scrapes.SECONDS", 60.0)
    async with serving(tmp_path, **ON) as running, AsyncExitStack() as stack:
        other, writer = await metrics_connection(running, "127.0.0.9")
        stack.callback(writer.close)
        writer.write(b"GET /metrics HTTP/1.1\r\n")
        held = [await metrics_connection(running) for _ in range(2 * PER_ADDRESS)]
        for _, one in held:
            stack.callback(one.close)
            one.write(b"G")
        with fail_after(20):
            for reader, _ in held[:PER_ADDRESS]:
                with suppress(OSError):
                    assert await reader.read() == b""
            writer.write(b"Host: localhost\r\n\r\n")
            assert (await other.read()).startswith(b"HTTP/1.1 200 ")


async def metrics_connection(running: Running, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = running.metrics.rpartition(":")
    return await asyncio.open_connection(host, int(port), local_addr=(source, 0))


HOSTS = {
    "localhost": b"200", "LOCALHOST:9464": b"200", "localhost.": b"200", "127.0.0.1:9464": b"200", "[::1]:1": b"200",
    "[::1]": b"200", "10.0.0.1": b"200", "prometheus.example": b"200", "Prometheus.Example:80": b"200",
    "evil.example": b"421", "evil.example:9464": b"421", "localhost.evil.example": b"421", "127.0.0.1.evil.example": b"421",
    "": b"421", "::1": b"421", "localhost:": b"421", "localhost:99999": b"421", "a b": b"421", "[localhost]:1": b"200",
}  # fmt: skip


async def test_a_browser_that_was_led_here_by_another_name_is_told_nothing(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    async with serving(tmp_path, **ON, metrics_hosts=("prometheus.example",), audit_log=log) as running:
        said = {}
        for host in HOSTS:
            head, body = await ask(running, f"GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            said[host] = head.split()[1]
            assert (b"jobrunner_" in body) == (said[host] == b"200")
        assert said == HOSTS
    line = json.loads(log.read_text().splitlines()[0])
    reason = "metrics: Host is 'evil.example', which metrics_hosts does not name"
    assert (line["event"], line["rpc"], line["reason"]) == ("denied", "/metrics", reason)
    assert line["address"].startswith("127.0.0.1:")


async def test_a_head_that_comes_slowly_has_a_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobrunner.server.scrapes.SECONDS", 0.3)
    async with serving(tmp_path, **ON) as running:
        reader, writer = await metrics_connection(running)
        with fail_after(20), suppress(OSError):
            while not reader.at_eof():
                writer.write(b"x")
                await writer.drain()
                with suppress(TimeoutError):
                    assert await asyncio.wait_for(reader.read(), 0.05) == b""
        writer.close()


async def test_many_that_ask_at_once_are_told_what_was_told_a_moment_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobrunner.server.scrapes.FRESH", 0.001)
    async with serving(tmp_path, **ON) as running:
        bodies = {(await ask(running))[1] for _ in range(20)}
        assert len(bodies) == 1, "each is of its moment otherwise: process_cpu_seconds_total"


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 405 "),
        (b"GET /etc/passwd HTTP/1.1\r\nHOST:localhost\r\n\r\n", b"HTTP/1.1 404 "),
        (b"HEAD /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n", b"HTTP/1.1 200 "),
        (b"GET /metrics?x HTTP/1.0\r\n\r\n", b"HTTP/1.1 200 "),
        (b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 5000 + b"\r\n", b""),
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 400 "),
        (b"\r\n\r\n", b"HTTP/1.1 400 "),
        (b"\x16\x03\x01\x02\x00", b"HTTP/1.1 400 "),
    ],
    ids=["POST", "path", "HEAD", "query", "long", "no host", "two hosts", "none", "TLS"],
)  # fmt: skip
async def test_other_requests_have_an_answer_or_none(tmp_path: Path, request_: bytes, answer: bytes) -> None:
    async with serving(tmp_path, **ON) as running:
        head, body = await ask(running, request_)
        assert head[: len(answer)] == answer
        assert bool(body) == ((b"40" in answer and b"405" not in answer) or (b"200" in answer and request_.startswith(b"GET")))
        assert (await samples(running))["jobrunner_connections",] == 0


async def test_it_is_off_unless_asked_for_and_told_where_it_cannot_be(tmp_path: Path) -> None:
    async with serving(tmp_path / "a") as running:
        assert running.metrics == ""
    async with serving(tmp_path / "b", **ON) as running:
        with anyio.fail_after(20), pytest.raises(HostError, match=f"cannot listen on {running.metrics}: "):
            async with serving(tmp_path / "c", metrics_listen=running.metrics):
                pass
