"""The two contexts against each other on real sockets, and what is told when they do not agree."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jobrunner.errors import ConfigError
from jobrunner.tls import client_context, server_context

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Files:
    ca: Path
    cert: Path
    key: Path


def issue(directory: Path, ca: trustme.CA, name: str, *identities: str) -> Files:
    leaf = ca.issue_cert(*identities, common_name=name, organization_unit_name="admin")
    files = Files(directory / "ca.pem", directory / f"{name}.pem", directory / f"{name}.key")
    ca.cert_pem.write_to_path(files.ca)
    leaf.private_key_pem.write_to_path(files.key)
    files.cert.unlink(missing_ok=True)
    for blob in leaf.cert_chain_pems:
        blob.write_to_path(files.cert, append=True)
    return files


@dataclass(frozen=True)
class Pki:
    ca: trustme.CA
    directory: Path
    server: Files
    admin: Files


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    directory = tmp_path_factory.mktemp("pki")
    ca = trustme.CA()
    return Pki(ca, directory, issue(directory, ca, "server", HOST), issue(directory, ca, "admin", "admin@jobrunner"))


def server_of(files: Files) -> ssl.SSLContext:
    return server_context(files.ca, files.cert, files.key)


def client_of(files: Files) -> ssl.SSLContext:
    return client_context(files.ca, files.cert, files.key)


@asynccontextmanager
async def serving(context: ssl.SSLContext) -> AsyncIterator[int]:
    """A server that answers `ok`; gives its port."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"ok")
        writer.close()

    server = await asyncio.start_server(answer, HOST, 0, ssl=context)
    try:
        with anyio.fail_after(10):
            yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def ask(port: int, context: ssl.SSLContext) -> tuple[bytes, ssl.SSLObject]:
    reader, writer = await asyncio.open_connection(HOST, port, ssl=context, server_hostname=HOST)
    try:
        return await reader.read(), writer.get_extra_info("ssl_object")
    finally:
        writer.close()


async def test_both_sides_of_one_ca_speak_tls_1_3_and_h2(pki: Pki) -> None:
    async with serving(server_of(pki.server)) as port:
        answer, connection = await ask(port, client_of(pki.admin))
    assert answer == b"ok"
    assert (connection.version(), connection.selected_alpn_protocol()) == ("TLSv1.3", "h2")


async def test_no_session_is_resumed(pki: Pki) -> None:
    context = client_of(pki.admin)
    async with serving(server_of(pki.server)) as port:
        _, connection = await ask(port, context)
    assert connection.session is None or not connection.session.has_ticket


async def test_tls_1_2_is_refused(pki: Pki) -> None:
    old = client_of(pki.admin)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with serving(server_of(pki.server)) as port:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await ask(port, old)


async def test_a_server_of_another_ca_or_name_is_refused_by_the_client(pki: Pki, tmp_path: Path) -> None:
    async with serving(server_of(issue(tmp_path, trustme.CA(), "stranger", HOST))) as port:
        with pytest.raises(ssl.SSLCertVerificationError):
            await ask(port, client_of(pki.admin))
    async with serving(server_of(issue(pki.directory, pki.ca, "elsewhere", "elsewhere.example"))) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
            await ask(port, client_of(pki.admin))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def encrypted(key: Path, path: Path) -> Path:
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    form, how = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    path.write_bytes(loaded.private_bytes(serialization.Encoding.PEM, form, how))
    return path


BAD_FILES: dict[str, Callable[[Files, Path], Files]] = {
    "cannot read CA certificate .*absent: No such file or directory": lambda good, tmp: Files(tmp / "absent", good.cert, good.key),
    "cannot read certificate .*absent: No such file or directory": lambda good, tmp: Files(good.ca, tmp / "absent", good.key),
    "cannot read key .*absent: No such file or directory": lambda good, tmp: Files(good.ca, good.cert, tmp / "absent"),
    "cannot read key .*: Is a directory": lambda good, tmp: Files(good.ca, good.cert, tmp),
    "cannot read CA certificate .*text: it holds no certificate": lambda good, tmp: Files(
        write(tmp / "text", "x"), good.cert, good.key
    ),
    "cannot read certificate .*text: it holds no certificate": lambda good, tmp: Files(good.ca, write(tmp / "text", "x"), good.key),
    "cannot read key .*text: it holds no private key": lambda good, tmp: Files(good.ca, good.cert, write(tmp / "text", "x")),
    "cannot read key .*enc: it is encrypted": lambda good, tmp: Files(good.ca, good.cert, encrypted(good.key, tmp / "enc")),
    "cannot read key .*other.key: it does not belong to certificate .*server.pem": lambda good, tmp: Files(
        good.ca, good.cert, issue(tmp, trustme.CA(), "other", "a@b").key
    ),
}


@pytest.mark.parametrize("message", BAD_FILES)
@pytest.mark.parametrize("make", [server_context, client_context])
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    pki: Pki, tmp_path: Path, message: str, make: Callable[[Path, Path, Path], ssl.SSLContext]
) -> None:
    bad = BAD_FILES[message](pki.server, tmp_path)
    with pytest.raises(ConfigError, match=message):
        make(bad.ca, bad.cert, bad.key)


def test_a_key_under_a_passphrase_is_opened_by_its_file(pki: Pki, tmp_path: Path) -> None:
    key, right, wrong = (
        encrypted(pki.server.key, tmp_path / "enc"),
        write(tmp_path / "right", "secret\n"),
        write(tmp_path / "wrong", "x"),
    )
    files = (pki.server.ca, pki.server.cert, key)
    for make in (server_context, client_context):
        make(*files, passphrase_file=right)
        with pytest.raises(ConfigError, match=f"cannot read key {key}: the passphrase in {wrong} does not open it"):
            make(*files, passphrase_file=wrong)
        with pytest.raises(ConfigError, match=f"cannot read passphrase file {tmp_path}/none: No such file or directory"):
            make(*files, passphrase_file=tmp_path / "none")
        with pytest.raises(ConfigError, match="its first line is empty"):
            make(*files, passphrase_file=write(tmp_path / "empty", "\nsecret"))


async def test_chains_with_an_intermediate_ca_are_verified_on_both_sides(tmp_path: Path) -> None:
    root = trustme.CA()
    between = root.create_child_ca()
    server, admin = issue(tmp_path, between, "server", HOST), issue(tmp_path, between, "admin", "admin@jobrunner")
    root.cert_pem.write_to_path(tmp_path / "ca.pem")
    assert server.cert.read_text().count("BEGIN CERTIFICATE") == 2, "the leaf, and the CA between"
    async with serving(server_of(server)) as port:
        answer, connection = await ask(port, client_of(admin))
    assert answer == b"ok"
    assert connection.version() == "TLSv1.3"


def revoking(ca: trustme.CA, *serials: int) -> bytes:
    """A CA's revocation list, PEM."""
    (issuer,), now = x509.load_pem_x509_certificates(ca.cert_pem.bytes()), datetime.now(UTC)
    key = serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    aki = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    made = x509.CertificateRevocationListBuilder(issuer.subject, now, now + timedelta(days=1)).add_extension(aki, critical=False)
    made = made.add_extension(x509.CRLNumber(1), critical=False)
    for serial in serials:
        made = made.add_revoked_certificate(x509.RevokedCertificateBuilder(serial, now).build())
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("revoked", [False, True])
async def test_clients_of_an_intermediate_ca_that_is_revoked_are_refused(tmp_path: Path, revoked: bool) -> None:
    root = trustme.CA()
    between = root.create_child_ca()
    server, admin = issue(tmp_path, root, "server", HOST), issue(tmp_path, between, "admin", "admin@jobrunner")
    root.cert_pem.write_to_path(tmp_path / "ca.pem")
    (middle,) = x509.load_pem_x509_certificates(between.cert_pem.bytes())
    lists = tmp_path / "crl.pem"
    lists.write_bytes(revoking(root, *[middle.serial_number][: int(revoked)]) + revoking(between))
    async with serving(server_context(server.ca, server.cert, server.key, crl=lists)) as port:
        answer = b""
        with suppress(OSError):  # or an end without a word: asyncio tells no alert that comes after its own handshake
            answer, _ = await ask(port, client_of(admin))
    assert answer == (b"" if revoked else b"ok")
