"""Every RPC x certificates made by `openssl`, against a table written by hand, and what each client is told."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from jobrunner.client import JobClient
from jobrunner.config import RunnerConfig, ServerConfig
from jobrunner.errors import JobRunnerError, PermissionDenied, Unauthenticated, Unavailable
from jobrunner.job import JobSpec
from jobrunner.server.process import RunningServer, running_server
from tests.service.test_roles import AS_ADMIN, AS_VIEWER, DENIED, REFUSED, TABLE, _answer
from tests.support.certs import Pair
from tests.support.openssl import DAY, OpenSslCa
from tests.support.server import eventually, official_channel
from tests.support.timing import at_most, fail_after

pytestmark = pytest.mark.requires("root", "command:openssl")

UNAUTHENTICATED = dict.fromkeys(TABLE, "UNAUTHENTICATED")
REJECTED = "the server rejected the client certificate: "
NOT_OURS = REJECTED + "it is not signed by the server's CA"

# kind -> what every RPC answers, the error that the SDK raises (none: it may list jobs), and what that says.
KINDS: dict[str, tuple[dict[str, str], type[JobRunnerError] | None, str]] = {
    "admin": (AS_ADMIN, None, ""),
    "viewer": (AS_VIEWER, None, ""),
    "self-signed": (REFUSED, Unauthenticated, NOT_OURS),
    "stranger's CA": (REFUSED, Unauthenticated, NOT_OURS),
    "same-name CA": (REFUSED, Unauthenticated, NOT_OURS),
    "expired": (REFUSED, Unauthenticated, REJECTED + "it has expired"),
    "not yet valid": (REFUSED, Unauthenticated, REJECTED + "it is not valid, or not yet"),
    "revoked": (REFUSED, Unauthenticated, REJECTED + "it is revoked"),
    "server use": (REFUSED, Unauthenticated, REJECTED + "it is not for use by a client"),
    "no use": (UNAUTHENTICATED, Unauthenticated, "the client certificate does not say that it is for clients"),
    "two OUs": (DENIED, PermissionDenied, "has 2 organizational units"),
    "no OU": (DENIED, PermissionDenied, "has 0 organizational units"),
    "OU only in the issuer": (DENIED, PermissionDenied, "has 0 organizational units"),
    "unknown OU": (DENIED, PermissionDenied, '"operators", is no role'),
    "Admin": (DENIED, PermissionDenied, '"Admin", is no role'),
    "admin, padded": (DENIED, PermissionDenied, '" admin", is no role'),
}
NO = ("PERMISSION_DENIED",)
IN_TLS = {
    "self-signed": "self-signed certificate",
    "stranger's CA": "unable to get local issuer certificate",
    "same-name CA": "unable to get local issuer certificate",
    "expired": "certificate has expired",
    "not yet valid": "certificate is not yet valid",
    "revoked": "certificate revoked",
    "server use": "unsuitable certificate purpose",
}
"""What the audit log says of a handshake: OpenSSL's words."""


@dataclass(frozen=True)
class Site:
    running: RunningServer
    ca: OpenSslCa
    trusted: Path
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        """Of the audit log."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@asynccontextmanager
async def site(path: Path) -> AsyncIterator[Site]:
    """A server that trusts two CAs, one of which has a role in its own name."""
    ca, titled = OpenSslCa(path / "ca"), OpenSslCa(path / "titled", "/OU=admin/CN=titled CA")
    pair = ca.issue("server", "/CN=server", use="serverAuth", hosts="DNS:localhost,IP:127.0.0.1")
    revoked = ca.issue("revoked", "/OU=admin/CN=c")
    ca.revoke(revoked)
    bundle, lists = path / "ca.pem", path / "crl.pem"
    bundle.write_bytes(ca.pem.read_bytes() + titled.pem.read_bytes())
    lists.write_bytes(ca.crl.read_bytes() + titled.crl.read_bytes())
    runner = RunnerConfig(state_dir=path / "state")
    log = path / "audit.jsonl"
    config = ServerConfig(runner=runner, listen="127.0.0.1:0", ca=bundle, cert=pair.cert, key=pair.key, crl=lists, audit_log=log)
    async with running_server(config) as running:
        yield Site(running, ca, bundle, log)


def certificate(here: Site, kind: str) -> Pair:
    ca, beside = here.ca, here.ca.directory.parent
    make: dict[str, Callable[[], Pair]] = {
        "admin": lambda: ca.issue("c", "/OU=admin/CN=c"),
        "viewer": lambda: ca.issue("c", "/OU=viewer/CN=c"),
        "self-signed": lambda: ca.self_signed("c", "/OU=admin/CN=c"),
        "stranger's CA": lambda: OpenSslCa(beside / "stranger", "/CN=stranger").issue("c", "/OU=admin/CN=c"),
        "same-name CA": lambda: OpenSslCa(beside / "twin").issue("c", "/OU=admin/CN=c"),
        "expired": lambda: ca.issue("c", "/OU=admin/CN=c", start=-2 * DAY, end=timedelta(minutes=-1)),
        "not yet valid": lambda: ca.issue("c", "/OU=admin/CN=c", start=timedelta(hours=1)),
        "revoked": lambda: Pair(ca.directory / "revoked.pem", ca.directory / "revoked.key"),
        "server use": lambda: ca.issue("c", "/OU=admin/CN=c", use="serverAuth"),
        "no use": lambda: ca.issue("c", "/OU=admin/CN=c", use=""),
        "two OUs": lambda: ca.issue("c", "/OU=admin/OU=viewer/CN=c"),
        "no OU": lambda: ca.issue("c", "/CN=c"),
        "OU only in the issuer": lambda: reissue(beside / "titled", "/CN=c"),
        "unknown OU": lambda: ca.issue("c", "/OU=operators/CN=c"),
        "Admin": lambda: ca.issue("c", "/OU=Admin/CN=c"),
        "admin, padded": lambda: ca.issue("c", "/OU= admin/CN=c"),
    }
    return make[kind]()


def reissue(directory: Path, subject: str) -> Pair:
    """From a CA that is there already."""
    ca = OpenSslCa.__new__(OpenSslCa)
    ca.directory = directory
    return ca.issue("c", subject)


@pytest.mark.parametrize("kind", KINDS)
async def test_every_rpc_and_the_client_are_told(tmp_path: Path, kind: str) -> None:
    answers, error, told = KINDS[kind]
    async with site(tmp_path) as here:
        pair = certificate(here, kind)
        with fail_after(40):
            said = {}
            for rpc in TABLE:
                # A connection of its own: one with a certificate that is no good is ended soon.
                async with official_channel(here.running.address, here.trusted, pair) as channel:
                    said[rpc] = await _answer(channel, rpc)
            assert said == answers
            async with JobClient(here.running.address, ca=here.trusted, cert=pair.cert, key=pair.key, resume_timeout=0) as client:
                if error is None:
                    assert await client.list() == []
                else:
                    with pytest.raises(error) as caught:
                        await client.list()
                    assert told in caught.value.message
        lines = here.lines()
        if answers is REFUSED:
            assert {line["event"] for line in lines} == {"handshake"}
            assert IN_TLS[kind] in {line["reason"] for line in lines}
        elif error is not None:
            assert {line["event"] for line in lines} <= {"denied", "cut"}
            assert {line["rpc"] for line in lines if told in line["reason"] and line["event"] == "denied"} == {*TABLE}
        else:
            assert {line["rpc"] for line in lines if line["event"] == "allowed"} == {rpc for rpc in TABLE if answers[rpc] not in NO}


async def test_a_client_below_tls_1_3_and_the_server_both_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with site(tmp_path) as here:
        pair = certificate(here, "admin")
        context = ssl.create_default_context(cafile=here.trusted)
        context.load_cert_chain(pair.cert, pair.key)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        host, _, port = here.running.address.rpartition(":")

        def connect() -> str | None:
            with socket.create_connection((host, int(port))) as raw, pytest.raises(ssl.SSLError) as caught:
                context.wrap_socket(raw, server_hostname="localhost")
            return caught.value.reason

        with fail_after(20):
            assert await anyio.to_thread.run_sync(connect) == "TLSV1_ALERT_PROTOCOL_VERSION"
            await eventually(lambda: any(text.endswith(" failed: unsupported protocol") for text in caplog.messages))


async def test_a_server_below_tls_1_3_is_refused_by_the_client_which_says_so(tmp_path: Path) -> None:
    ca = OpenSslCa(tmp_path / "ca")
    pair = ca.issue("server", "/CN=server", use="serverAuth", hosts="DNS:localhost,IP:127.0.0.1")
    own = ca.issue("c", "/OU=admin/CN=c")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def refuse(listener: socket.socket) -> str | None:
        raw, _ = listener.accept()
        with raw, pytest.raises(ssl.SSLError) as caught:
            context.wrap_socket(raw, server_side=True)
        return caught.value.reason

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with fail_after(20):
            async with (
                JobClient(address, ca=ca.pem, cert=own.cert, key=own.key) as client,
                anyio.create_task_group() as group,
            ):
                group.start_soon(anyio.to_thread.run_sync, refuse, listener)
                with pytest.raises(Unavailable, match=f"cannot reach {address}: .*the server does not speak TLS 1.3"):
                    await client.list()


async def test_a_clients_certificate_is_none_for_a_server(tmp_path: Path) -> None:
    """Whoever has one could pose as the server otherwise."""
    ca = OpenSslCa(tmp_path / "ca")
    posing = ca.issue("server", "/OU=admin/CN=alice", use="clientAuth", hosts="DNS:localhost,IP:127.0.0.1")
    own = ca.issue("c", "/OU=admin/CN=c")
    runner = RunnerConfig(state_dir=tmp_path / "state")
    config = ServerConfig(runner=runner, listen="127.0.0.1:0", ca=ca.pem, cert=posing.cert, key=posing.key)
    async with (
        running_server(config) as running,
        JobClient(running.address, ca=ca.pem, cert=own.cert, key=own.key) as client,
    ):
        with (
            fail_after(20),
            pytest.raises(Unauthenticated, match=r"server's certificate is not acceptable: un\w+ certificate purpose"),
        ):
            await client.list()


async def test_a_certificate_that_is_not_strict_x509_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with site(tmp_path) as here:
        pair = here.ca.issue("c", "/OU=admin/CN=c", key_usage="digitalSignature, keyCertSign")  # of no CA
        async with JobClient(here.running.address, ca=here.trusted, cert=pair.cert, key=pair.key) as client:
            with fail_after(20), pytest.raises(Unauthenticated, match="the server rejected the client certificate"):
                await client.list()
        assert any("non-ca" in text.lower() for text in caplog.messages)


async def test_what_does_not_speak_http2_is_not_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with site(tmp_path) as here:
        pair = certificate(here, "admin")
        context = ssl.create_default_context(cafile=here.trusted)
        context.load_cert_chain(pair.cert, pair.key)
        host, _, port = here.running.address.rpartition(":")
        with fail_after(20):
            reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
            with suppress(OSError):
                await reader.read()  # to its end: what the server had to say, and no answer
            writer.close()
            await eventually(lambda: any("it does not speak HTTP/2 (ALPN h2)" in text for text in caplog.messages))


async def test_a_certificate_that_ends_on_a_live_connection_ends_it(tmp_path: Path) -> None:
    """A stream and a call that waits are told within 5 s of that, and the job runs on."""
    async with site(tmp_path) as here:
        job = await here.running.runner.start(JobSpec("/bin/sleep", ("60",)), user="c")
        end = datetime.now(UTC) + timedelta(seconds=4)
        pair = here.ca.issue("c", "/OU=viewer/CN=c", end=timedelta(seconds=4))
        told: list[str] = []

        async def until_told(call: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(Unauthenticated) as caught:
                await call()
            told.append(caught.value.message)

        with fail_after(30):
            async with JobClient(here.running.address, ca=here.trusted, cert=pair.cert, key=pair.key) as client:
                same = client.get(job.job_id)
                assert (await same.info()).status == "running"
                async with same.log() as output, anyio.create_task_group() as group:
                    group.start_soon(until_told, output.next_line)
                    group.start_soon(until_told, same.wait)
                assert datetime.now(UTC) - end < timedelta(seconds=at_most(5))
                assert all("the client certificate has expired" in text for text in told), told
                await eventually(lambda: here.running.server.connections == 0)
                with pytest.raises(Unauthenticated, match="it has expired"):
                    await client.list()
        assert not job.ended
        cuts = [(line["user"], line["reason"]) for line in here.lines() if line["event"] == "cut"]
        assert cuts == [("c", "the client certificate has expired")]
        await job.stop(grace=0)
