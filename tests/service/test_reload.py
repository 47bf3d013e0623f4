"""Certificate files that change under a running server: who is trusted then, who is not, and who must not notice."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.streams.tls
import pytest

from jobrunner.client import JobClient
from jobrunner.config import RunnerConfig, ServerConfig
from jobrunner.errors import ConfigError, Unauthenticated
from jobrunner.job import JobSpec
from jobrunner.pki import Authority, Profile
from jobrunner.server.process import RunningServer, running_server
from jobrunner.server.trust import Client, Trust
from tests.support.daemon import ServerProcess, server_process
from tests.support.handshake import Handshake
from tests.support.server import eventually
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root")
COUNTING = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.02; done"


@dataclass(frozen=True)
class Site:
    """A server on the files of `live`, which are copies of those of a CA."""

    running: RunningServer
    ca: Path
    live: Path

    def client(self, user: str, trusted: Path | None = None) -> JobClient:
        return client_of(self, trusted or self.ca / "ca.pem", self.ca / user)

    def publish(self, *names: str) -> None:
        publish(self.ca, self.live, *names)


def client_of(here: Site, trusted: Path, own: Path) -> JobClient:
    files = own.with_suffix(".pem"), own.with_suffix(".key")
    return JobClient(here.running.address, ca=trusted, cert=files[0], key=files[1], resume_timeout=0)


def publish(ca: Path, live: Path, *names: str) -> None:
    """Replace files whole, as a deployment does."""
    for name in names:
        shutil.copy(ca / name, live / f".{name}")
        (live / f".{name}").rename(live / name)


FILES = ("ca.pem", "server.pem", "server.key", "crl.pem")


def make_ca(directory: Path, *users: str) -> Path:
    Authority.create(directory, name=f"CA {directory.name}")
    with Authority.opened(directory) as authority:
        authority.issue("server", Profile("server", hosts=("localhost", "127.0.0.1")))
        for user in users:
            authority.issue(user, Profile(user, "admin"))
    return directory


def config_of(path: Path) -> ServerConfig:
    live = path / "live"
    ca, cert, key, crl = (live / name for name in FILES)
    runner, log = RunnerConfig(state_dir=path / "state"), path / "audit.jsonl"
    return ServerConfig(runner=runner, listen="127.0.0.1:0", ca=ca, cert=cert, key=key, crl=crl, audit_log=log)


@asynccontextmanager
async def site(path: Path, *users: str) -> AsyncIterator[Site]:
    ca = make_ca(path / "ca", *users)
    (path / "live").mkdir()
    publish(ca, path / "live", *FILES)
    async with running_server(config_of(path)) as running:
        try:
            yield Site(running, ca, path / "live")
        finally:
            for job in await running.runner.list():
                await job.stop(grace=0)


async def test_revocation_and_renewal_under_fifty_followers(tmp_path: Path) -> None:
    """The revoked one is cut within 5 s and told why; no other loses a byte, nor its connection."""
    got: dict[int, bytearray] = {}
    revoked: list[str] = []
    async with site(tmp_path, "alice", "mallory") as here, AsyncExitStack() as stack:
        job = await here.running.runner.start(JobSpec("sh", ("-c", COUNTING)), user="alice")

        async def follow(number: int, user: str) -> None:
            client = await stack.enter_async_context(here.client(user))
            got[number] = bytearray()
            async with client.get(job.job_id).log() as reader:
                try:
                    async for chunk in reader:
                        got[number] += getattr(chunk, "data", b"")
                except Unauthenticated as exc:
                    assert user == "mallory"
                    revoked.append(exc.message)

        with anyio.fail_after(at_most(50)):
            async with anyio.create_task_group() as group:
                for number in range(50):
                    group.start_soon(follow, number, "mallory" if number == 0 else "alice")
                await eventually(lambda: len(got) == 50 and all(got.values()), at_most(20))
                held = set(here.running.server._connections)
                with Authority.opened(here.ca) as authority:
                    authority.renew("server")
                    authority.revoke("mallory")
                here.publish(*FILES)
                begun = anyio.current_time()
                await eventually(lambda: bool(revoked), at_most(10))
                assert anyio.current_time() - begun < at_most(5)
                await eventually(lambda: len(here.running.server._connections) == 49)
                assert set(here.running.server._connections) < held, "nobody has connected again"
                before = {number: len(data) for number, data in got.items()}
                await eventually(lambda: all(len(got[number]) > before[number] for number in range(1, 50)))
                async with here.client("mallory") as client:
                    with pytest.raises(Unauthenticated, match="rejected the client certificate: it is revoked"):
                        await client.list()
                assert await served(here) == serial(here.live / "server.pem")
                await job.stop(grace=0)
        assert "the client certificate is revoked" in revoked[0]
        lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        cuts = [(line["user"], line["reason"]) for line in lines if line["event"] == "cut"]
        assert cuts == [("mallory", "the client certificate is revoked")]
        ends = {(line["user"], line["outcome"]) for line in lines if line["event"] == "done"}
        assert ("mallory", "UNAUTHENTICATED") in ends
        async with job.log(follow=False) as reader:
            whole = b"".join([getattr(chunk, "data", b"") async for chunk in reader])
        assert len(whole) > 100
        assert all(bytes(got[number]) == whole for number in range(1, 50))
        assert whole.startswith(bytes(got[0]))


async def test_no_connection_is_missed_while_files_change(tmp_path: Path) -> None:
    """New ones all the time, while certificate and list are renewed and published again and again."""
    made = 0
    async with site(tmp_path, "alice") as here:

        async def connect_again_and_again() -> None:
            nonlocal made
            while True:
                async with here.client("alice") as client:
                    await client.server()
                    made += 1

        seen = set()
        with anyio.fail_after(at_most(50)):
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(connect_again_and_again)
                for _ in range(5):
                    with Authority.opened(here.ca) as authority:
                        authority.renew("server")
                        authority.sign_revoked([])
                    here.publish(*FILES)
                    here.running.trust.ask()
                    new = serial(here.live / "server.pem")
                    while await served(here) != new:
                        pass
                    seen.add(new)
                    enough = made + 5
                    while made < enough:  # noqa: ASYNC110
                        await anyio.sleep(0.01)
                group.cancel_scope.cancel()
    assert len(seen) == 5


async def test_handshakes_that_are_under_way_when_files_change_are_brought_to_their_end(tmp_path: Path) -> None:
    async with site(tmp_path, "alice") as here:
        context = context_of(here)
        peers = [await Handshake(context).connect(here.running.address) for _ in range(20)]
        for number, peer in enumerate(peers):
            await peer.send(1 + 100 * number)
        await eventually(lambda: len(here.running.server.listener.open) == len(peers))
        old = serial(here.live / "server.pem")
        with Authority.opened(here.ca) as authority:
            authority.renew("server")
        here.publish(*FILES)
        here.running.trust.ask()
        while await served(here) == old:
            pass
        for peer in peers:
            await peer.send(1 << 20)
            assert serial_of(peer.tls.getpeercert()) == old
        await eventually(lambda: len(here.running.server._connections) == len(peers))
        for peer in peers:
            peer.vanish()
        await eventually(lambda: not here.running.server.listener.open)


async def served(here: Site) -> int:
    """The serial number of the certificate that a new connection is shown."""
    host, _, port = here.running.address.rpartition(":")
    stream = await anyio.connect_tcp(host, int(port), ssl_context=context_of(here), tls=True, tls_standard_compatible=False)
    async with stream:
        certificate: Any = stream.extra(anyio.streams.tls.TLSAttribute.peer_certificate)
    return serial_of(certificate)


def context_of(here: Site) -> ssl.SSLContext:
    """Alice's."""
    context = ssl.create_default_context(cafile=here.ca / "ca.pem")
    context.load_cert_chain(here.ca / "alice.pem", here.ca / "alice.key")
    context.set_alpn_protocols(["h2"])
    return context


def serial_of(certificate: Any) -> int:
    return int(certificate["serialNumber"], 16)


def serial(path: Path) -> int:
    from cryptography import x509

    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


async def test_a_ca_that_is_taken_out_takes_its_connections_with_it(tmp_path: Path) -> None:
    """Two CAs in one bundle, as while one takes over from the other; then the old one goes."""
    new = make_ca(tmp_path / "new", "bob")
    async with site(tmp_path, "alice") as here:
        for name in ("ca.pem", "crl.pem"):
            (here.ca / f"both-{name}").write_bytes((here.ca / name).read_bytes() + (new / name).read_bytes())
            publish_as(here, f"both-{name}", name)
        both = here.ca / "both-ca.pem"
        async with here.client("alice", both) as alice, client_of(here, both, new / "bob") as bob:
            await alice.list()
            await eventually(lambda: "2 CAs" in repr(here.running.trust))
            await bob.list()
            publish(new, here.live, *FILES)
            await eventually(lambda: len(here.running.server._connections) == 1)
            with pytest.raises(Unauthenticated, match="not signed by the server's CA"):
                await alice.list()
            await bob.list()


def publish_as(here: Site, source: str, name: str) -> None:
    shutil.copy(here.ca / source, here.live / f".{name}")
    (here.live / f".{name}").rename(here.live / name)


async def test_files_that_cannot_be_used_are_told_once_and_the_old_ones_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with site(tmp_path, "alice") as here, here.client("alice") as client:
        await client.list()
        with caplog.at_level(logging.ERROR, "jobrunner.server.trust"):
            (here.live / "server.pem").write_text("nonsense")
            await eventually(lambda: bool(caplog.records))
            here.running.trust.ask()
            await eventually(lambda: len(caplog.records) == 2)
        why = f"cannot read certificate {here.live}/server.pem: it holds no certificate in PEM form"
        assert caplog.records[0].getMessage() == f"{why}; the files from before stay in force"
        async with here.client("alice") as another:
            await another.list()
        await client.list()
        here.publish("server.pem")
        async with here.client("alice") as another:
            await another.list()


async def test_a_revocation_list_that_ends_is_told_before_and_refuses_everyone_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with site(tmp_path, "alice") as here:
        now = datetime.now(UTC)
        assert here.running.trust.warnings(now) == []
        assert here.running.trust.warnings(now + timedelta(days=21))[0] == (
            "the revocation list of CN=CA ca expires in 9.0 days: everyone is refused then"
        )
        assert "has expired: everyone is refused" in here.running.trust.warnings(now + timedelta(days=31))[0]
        with Authority.opened(here.ca) as authority:
            authority.sign_revoked([], days=0)
        with caplog.at_level(logging.WARNING, "jobrunner.server.trust"):
            here.publish("crl.pem")
            await eventually(lambda: any("has expired: everyone" in record.getMessage() for record in caplog.records))
        async with here.client("alice") as client:
            with pytest.raises(Unauthenticated, match="rejected the client certificate: it has expired"):
                await client.list()


def test_a_client_is_judged_by_its_time_and_by_its_purpose(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    ca = make_ca(tmp_path / "ca", "alice")
    publish_dir = tmp_path / "live"
    publish_dir.mkdir()
    publish(ca, publish_dir, *FILES)
    trust = Trust(config_of(tmp_path))
    root, alice, server = (
        x509.load_pem_x509_certificate((ca / f"{name}.pem").read_bytes()).public_bytes(Encoding.DER)
        for name in ("ca", "alice", "server")
    )
    now = datetime.now(UTC)
    assert trust.judge(Client.of([alice, root]), now) == ""
    assert trust.judge(Client.of([alice, root]), now + timedelta(days=29)) == ""
    assert "has expired" in trust.judge(Client.of([alice, root]), now + timedelta(days=31))
    assert "extended key usage" in trust.judge(Client.of([server, root]), now)
    assert "cannot be read" in trust.admit([b"nonsense"])[1]


def test_a_client_is_judged_by_every_certificate_between_it_and_its_ca(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    ca = make_ca(tmp_path / "ca", "alice", "bob")
    with Authority.opened(ca) as authority:
        authority.revoke("bob")
    (tmp_path / "live").mkdir()
    publish(ca, tmp_path / "live", *FILES)
    trust = Trust(config_of(tmp_path))
    alice, bob, root = (
        x509.load_pem_x509_certificate((ca / f"{name}.pem").read_bytes()).public_bytes(Encoding.DER)
        for name in ("alice", "bob", "ca")
    )
    now = datetime.now(UTC)
    assert trust.judge(Client.of([alice, root]), now) == ""
    assert "is revoked" in trust.judge(Client.of([bob, root]), now)
    assert "is revoked" in trust.judge(Client.of([alice, bob, root]), now)


def test_a_revocation_list_that_is_none_keeps_a_server_from_starting(tmp_path: Path) -> None:
    ca = make_ca(tmp_path / "ca")
    (tmp_path / "live").mkdir()
    publish(ca, tmp_path / "live", *FILES)
    (tmp_path / "live/crl.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"cannot read revocation list .*crl.pem: it holds none in PEM form"):
        Trust(config_of(tmp_path))


def test_sighup_reads_the_files_again(tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        server.process.send_signal(signal.SIGHUP)

        async def told(server: ServerProcess) -> None:
            await eventually(lambda: b"read the certificates again: <Trust 1 CAs 0 revoked>" in server.log, at_most(10))
            async with server.client() as client:
                assert await client.list() == []

        anyio.run(told, server)


def test_check_tells_what_is_wrong_with_the_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ca = make_ca(tmp_path / "ca")
    for key, file in {"CA": "ca.pem", "CERT": "server.pem", "KEY": "server.key", "CRL": "crl.pem"}.items():
        monkeypatch.setenv(f"JOBRUNNERD_{key}", str(ca / file))
    assert found(tmp_path) == [("ok", "they hold, the revocation list too")]
    with Authority.opened(ca) as authority:
        authority.sign_revoked([], days=3)
    ((level, what),) = found(tmp_path)
    assert level == "limited"
    assert what.startswith("the revocation list of CN=CA ca expires in 3.0 days: everyone is refused then")
    (ca / "server.key").write_text("nonsense")
    assert found(tmp_path) == [("missing", f"cannot read key {ca}/server.key: it holds no private key in PEM form")]


def found(tmp_path: Path) -> list[tuple[str, str]]:
    """What `jobrunnerd check` says of certificates."""
    program = Path(sys.executable).with_name("jobrunnerd")
    command = [str(program), "check", "--json", f"--state-dir={tmp_path}/state"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    return [(each["level"], each["what"]) for each in json.loads(done.stdout) if each["name"] == "certificates"]
