"""What goes wrong between a client and a server, as errors of this project."""

from __future__ import annotations

import asyncio
import math
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from jobrunner.client import JobClient
from jobrunner.errors import ConfigError, JobNotFound, JobRunnerError, Timeout, Unauthenticated, Unavailable, Unsupported
from jobrunner.server.devcerts import make_certs
from tests.support.daemon import ServerProcess
from tests.support.peer import client_of, peer_client
from tests.support.proxy import proxy_to
from tests.support.timing import fail_after

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

JOB = "0123456789ab"


async def silent(stream: Any) -> None:
    await anyio.sleep_forever()


async def test_a_call_the_server_does_not_know_says_that_it_is_too_old(tmp_path: Path) -> None:
    with anyio.fail_after(10):
        async with peer_client(tmp_path) as (client, _):
            with pytest.raises(Unsupported, match=f"cannot query job {JOB}: the server at 127.0.0.1:.* is too old"):
                await client.get(JOB).status()


async def test_a_server_that_does_not_answer_in_time_is_a_timeout(tmp_path: Path) -> None:
    with anyio.fail_after(10):
        async with peer_client(tmp_path, status=silent, timeout=0.3) as (client, _):
            with pytest.raises(Timeout, match=f"cannot query job {JOB}: no answer from 127.0.0.1:.* within 0.3 s"):
                await client.get(JOB).info()


async def test_after_a_timeout_the_task_can_be_cancelled_and_time_out_as_any_other(tmp_path: Path) -> None:
    with anyio.fail_after(10):
        async with peer_client(tmp_path, status=silent, timeout=0.1) as (client, _):
            with pytest.raises(Timeout):
                await client.get(JOB).info()
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await anyio.sleep_forever()


async def test_a_callers_own_deadline_stays_its_own(tmp_path: Path) -> None:
    with anyio.fail_after(10):
        async with peer_client(tmp_path, status=silent, timeout=60) as (client, _):
            with anyio.move_on_after(0.2) as scope:
                await client.get(JOB).info()
            assert scope.cancelled_caught


async def test_a_connection_lost_during_a_call_is_unavailable_and_the_next_call_connects_again(tmp_path: Path) -> None:
    calls = 0

    async def answer(stream: Any) -> None:
        nonlocal calls
        calls += 1
        stream._stream._transport.abort()

    with anyio.fail_after(10):
        async with peer_client(tmp_path, status=answer) as (client, _):
            for _ in range(2):
                with pytest.raises(Unavailable, match="lost the connection to 127.0.0.1:"):
                    await client.get(JOB).info()
    assert calls == 2


async def test_a_server_that_refuses_a_certificate_without_an_alert_may_also_have_too_much_to_do(tmp_path: Path) -> None:
    make_certs(tmp_path / "other")
    with anyio.fail_after(10):
        async with (
            peer_client(tmp_path) as (client, _),
            client_of(client.address, tmp_path, tmp_path / "other") as stranger,
        ):
            with pytest.raises(Unavailable, match="cannot reach 127.0.0.1:.* or rejects the client certificate without saying so"):
                await stranger.get(JOB).info()


async def test_nobody_there_is_unavailable_and_says_why(tmp_path: Path) -> None:
    make_certs(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with anyio.fail_after(10):
        async with client_of(address, tmp_path, tmp_path) as client:
            with pytest.raises(Unavailable, match=f"cannot reach {address}: Connection refused"):
                await client.list()


@pytest.mark.parametrize("missing", ["JOBRUNNER_ADDRESS", "JOBRUNNER_CA", "JOBRUNNER_CERT", "JOBRUNNER_KEY"])
def test_from_env_names_the_variable_that_is_missing(missing: str) -> None:
    environ = dict.fromkeys(["JOBRUNNER_ADDRESS", "JOBRUNNER_CA", "JOBRUNNER_CERT", "JOBRUNNER_KEY"], "host:1")
    del environ[missing]
    with pytest.raises(ConfigError, match=f"cannot read {missing}: it is not set"):
        JobClient.from_env(environ)


async def test_a_client_that_is_not_open_says_so() -> None:
    client = JobClient("host:1", ca="ca", cert="cert", key="key")
    with pytest.raises(JobRunnerError, match="cannot reach host:1: the client is not open"):
        await client.get(JOB).info()


async def test_every_refused_certificate_is_told_by_its_reason(server: ServerProcess) -> None:
    said = set()
    with anyio.fail_after(50):
        for _ in range(50):
            async with server.client("stranger") as client:
                with pytest.raises(Unauthenticated) as caught:
                    await client.list()
                said.add(caught.value.message.partition(": ")[2])
    assert said == {"the server rejected the client certificate: it is not signed by the server's CA"}


async def test_a_server_that_was_restarted_is_reached_by_the_same_client(tmp_path: Path) -> None:
    first = ServerProcess(tmp_path)
    with anyio.fail_after(50):
        async with first.client() as client:
            assert (await client.server()).draining is False
            first.end()
            with pytest.raises(Unavailable):
                await client.server()
            second = ServerProcess(tmp_path, listen=first.address)
            try:
                assert (await client.server()).running_jobs == 0
            finally:
                second.end()


@asynccontextmanager
async def closing_first(server: ServerProcess, count: float) -> AsyncIterator[JobClient]:
    """A client of a server in a flood of handshakes: its first connections are closed, after it has begun to speak."""
    left = count

    def budget() -> int | None:
        nonlocal left
        left -= 1
        return 0 if left >= 0 else None

    files = server.files()
    async with (
        proxy_to(server.address, budget) as proxy,
        JobClient(proxy.address, ca=files["ca"], cert=files["cert"], key=files["key"]) as client,
    ):
        yield client


async def test_a_first_connection_that_is_closed_without_a_word_is_made_again(server: ServerProcess) -> None:
    with fail_after(20):
        async with closing_first(server, 3) as client:
            assert (await client.server()).draining is False
        async with closing_first(server, 3) as client:
            with pytest.raises(JobNotFound):
                await client.get(JOB).wait()
        async with closing_first(server, 3) as client, client.get(JOB).log() as output:
            with pytest.raises(JobNotFound):
                await output.next_line()


async def test_a_server_that_always_closes_it_is_told_after_a_while(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobrunner.client.resume.FIRST_CONTACT", 0.5)
    with fail_after(20):
        async with closing_first(server, math.inf) as client:
            for call in (client.list, client.get(JOB).wait):
                with pytest.raises(Unavailable, match="cannot reach .*: the server closes connections during TLS: it has too many"):
                    await call()


async def test_a_name_that_is_none_is_told_at_once(tmp_path: Path) -> None:
    make_certs(tmp_path)
    with fail_after(20):
        async with client_of("no-such-host.invalid:1", tmp_path, tmp_path, resume_timeout=3600) as client:
            with pytest.raises(Unavailable, match="cannot reach no-such-host.invalid:1: "):
                await client.list()
