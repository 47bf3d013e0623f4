"""Whom the server trusts, now: its certificate files, read again when they change, and who is connected judged by them.

A connection outlives its handshake by days, so what was true then is asked again every SWEEP seconds. New files take the place of
the old ones in a new context, for handshakes from then on; files that cannot be used are told, and the old ones stay in force. No
connection that is still good notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from jobrunner.config import ServerConfig
from jobrunner.errors import CertificateError, ConfigError
from jobrunner.pki import describe
from jobrunner.tls import server_context

__all__ = ["Client", "Trust"]

logger = logging.getLogger(__name__)

SWEEP = 1.0
"""Seconds."""
REMIND = 3600.0
"""Seconds between warnings of the same."""
SOON = timedelta(days=10)
"""Before a revocation list expires, which refuses everyone, and a certificate of the server's."""

T = TypeVar("T")
_Signature = tuple[tuple[int, ...], ...]
Anchor = tuple[bytes, bytes]
"""Subject and public key, DER: a CA that was renewed with its old key is the same."""


@dataclass(frozen=True, slots=True)
class _Files:
    """What was read together."""

    context: ssl.SSLContext
    anchors: frozenset[Anchor]
    revoked: frozenset[tuple[bytes, int]]
    """Issuer, DER, and serial number."""
    lists: tuple[x509.CertificateRevocationList, ...]
    ends: Mapping[str, datetime]
    signature: _Signature


@dataclass(frozen=True, slots=True)
class Client:
    """What is judged of a client: of its verified certificates, from its own to the CA that it was accepted by."""

    not_after: datetime
    """Of the one that ends first."""
    ids: tuple[tuple[bytes, int], ...]
    """Issuer, DER, and serial number of each."""
    anchor: Anchor
    refusal: str
    """What is wrong with its own certificate for good, which OpenSSL lets pass: RFC 5280 takes one that does not say what it is for
    (extended key usage) as good for everything, here it is for nothing.
    """

    @classmethod
    def of(cls, chain: Sequence[bytes]) -> Client:
        """Of certificates in DER, the client's own first."""
        certificates = [x509.load_der_x509_certificate(each) for each in chain]
        try:
            uses = list(certificates[0].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        except x509.ExtensionNotFound:
            uses = []
        missing = "the client certificate does not say that it is for clients (extended key usage clientAuth)"
        return cls(
            min(each.not_valid_after_utc for each in certificates),
            tuple((each.issuer.public_bytes(), each.serial_number) for each in certificates),
            _anchor(certificates[-1]),
            "" if ExtendedKeyUsageOID.CLIENT_AUTH in uses else missing,
        )


class Trust:
    """The server's certificate files, as they are in force. Raises ConfigError if they cannot be used at the start."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._files = self._load()
        self._asked = asyncio.Event()
        self._told_at = -REMIND
        self._failed: _Signature = ()
        """Files that could not be used when they were last looked at."""
        self._refused: _Signature = ()
        """Files that cannot be used, which has been told."""

    def __repr__(self) -> str:
        return f"<Trust {len(self._files.anchors)} CAs {len(self._files.revoked)} revoked>"

    @property
    def context(self) -> ssl.SSLContext:
        """For the next handshake."""
        return self._files.context

    def ask(self) -> None:
        """Let `keep` read the files again, changed or not."""
        self._asked.set()

    def ends(self) -> Mapping[str, datetime]:
        """When the first of the files in force stops to hold: `server`, `ca`, `crl`."""
        return self._files.ends

    def admit(self, chain: Sequence[bytes]) -> tuple[Client, str]:
        """Who has just connected, and as `judge`: the files may have changed during the handshake."""
        try:
            client = Client.of(chain)
        except ValueError as exc:  # what OpenSSL reads and cryptography does not
            client = Client(datetime.now(UTC), (), (b"", b""), f"the client certificate cannot be read: {exc}")
        return client, self.judge(client, datetime.now(UTC))

    def judge(self, client: Client, now: datetime) -> str:
        """Why this client may not be served; "" if it may."""
        if client.refusal:
            return client.refusal
        if client.not_after < now:
            return "the client certificate has expired"
        if any(each in self._files.revoked for each in client.ids):
            return "the client certificate is revoked"
        if client.anchor not in self._files.anchors:
            return "the client certificate's CA is not trusted any more"
        return ""

    async def keep(self, changed: Callable[[], None]) -> None:
        """Until cancelled, every SWEEP seconds: read again what has changed, and call `changed`.

        Looked at rather than watched: that sees symbolic links and network file systems too, and the rest is due then anyway.
        """
        while True:
            await self._reload()
            await self._remind()
            changed()
            with anyio.move_on_after(SWEEP):
                await self._asked.wait()

    async def _reload(self) -> None:
        asked = self._asked.is_set()
        self._asked = asyncio.Event()
        signature = await _beside(self._signature)
        if not asked and signature in (self._files.signature, self._refused):
            return
        try:
            self._files = await _beside(self._load)
        except (ConfigError, OSError, ValueError) as exc:  # the last two of files that change while they are read, or are strange
            # Certificate and key are replaced one after the other: only what is still so the next time is told.
            if asked or signature == self._failed:
                self._refused = signature
                logger.error("%s; the files from before stay in force", getattr(exc, "message", f"cannot read certificates: {exc}"))
            self._failed = signature
        else:
            self._told_at = -REMIND
            logger.info("read the certificates again: %r", self)

    def _load(self) -> _Files:
        config = self._config
        signature = self._signature()
        context = server_context(config.ca, config.cert, config.key, crl=config.crl, passphrase_file=config.key_passphrase_file)
        try:
            cas = x509.load_pem_x509_certificates(config.ca.read_bytes())
            anchors = frozenset(map(_anchor, cas))
        except (OSError, ValueError) as exc:
            raise ConfigError(f"CA certificate {config.ca}", str(exc)) from exc
        try:
            own = x509.load_pem_x509_certificates(config.cert.read_bytes())
        except (OSError, ValueError) as exc:
            raise ConfigError(f"certificate {config.cert}", str(exc)) from exc
        lists = () if config.crl is None else tuple(_lists(config.crl))
        revoked = frozenset((each.issuer.public_bytes(), entry.serial_number) for each in lists for entry in each)
        ends = {"server": min(each.not_valid_after_utc for each in own), "ca": min(each.not_valid_after_utc for each in cas)}
        if lists:
            ends["crl"] = min(each.next_update_utc or datetime.now(UTC) for each in lists)
        return _Files(context, anchors, revoked, lists, ends, signature)

    def _paths(self) -> list[Path]:
        config = self._config
        return [path for path in (config.ca, config.cert, config.key, config.crl, config.key_passphrase_file) if path is not None]

    def _signature(self) -> _Signature:
        return tuple(map(_signature, self._paths()))

    async def _remind(self) -> None:
        """Once an hour, of what will refuse everyone soon."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._told_at < REMIND:
            return
        self._told_at = loop.time()
        for text in await _beside(self.warnings):
            logger.warning("%s", text)

    def warnings(self, now: datetime | None = None) -> list[str]:
        """What is wrong with the files in force, or will be soon."""
        now = now or datetime.now(UTC)
        found = []
        for each in self._files.lists:
            left = (each.next_update_utc or now) - now
            who = each.issuer.rfc4514_string()
            if left <= timedelta():
                found.append(f"the revocation list of {who} has expired: everyone is refused until it is renewed")
            elif left < SOON:
                found.append(
                    f"the revocation list of {who} expires in {left / timedelta(days=1):.1f} days: everyone is refused then"
                )
        having = {each.issuer.public_bytes() for each in self._files.lists}
        for subject, _ in self._files.anchors if self._config.crl is not None else ():
            if subject not in having:
                found.append("a CA has no revocation list: its clients are refused; each CA in `ca` needs one in `crl`")
        with contextlib.suppress(CertificateError, ValueError):
            found += [
                f"certificate {one.path}: {text}" for one in describe(self._config.cert, now=now)[:1] for text in one.warnings
            ]
        return found


async def _beside(read: Callable[[], T]) -> T:
    """Files may be anywhere, on a network that hangs too: neither calls nor the end of the server wait for them."""
    return await anyio.to_thread.run_sync(read, abandon_on_cancel=True)


def _signature(path: Path) -> tuple[int, ...]:
    """Another one once the file is another, or has other bytes."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _anchor(certificate: x509.Certificate) -> Anchor:
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return certificate.subject.public_bytes(), key


def _lists(path: Path) -> Iterable[x509.CertificateRevocationList]:
    begin = b"-----BEGIN X509 CRL-----"
    try:
        for part in path.read_bytes().split(begin)[1:]:
            yield x509.load_pem_x509_crl(begin + part)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"revocation list {path}", str(exc)) from exc
