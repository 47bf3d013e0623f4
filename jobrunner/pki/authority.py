"""A CA in a directory: ECDSA P-256, short-lived certificates for one purpose each, and a list of what is revoked.

A client's organizational unit (OU) is its role and its common name (CN) the user, as the server reads them. A server's certificate
has no OU, so that it is no role's, and names the hosts that it is reached by. Each says what it is for (extended key usage): a
client's cannot be a server's. Issuing, revoking and renewing also sign the revocation list anew: a CA in use has no expired one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from jobrunner.errors import CertificateError
from jobrunner.pki.profile import Profile, key_usage, user_of
from jobrunner.pki.store import PRIVATE, Store, key_to_pem, to_pem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

__all__ = ["CA_DAYS", "CLIENT_DAYS", "CRL_DAYS", "SERVER_DAYS", "Authority", "Issued"]

CA_DAYS, SERVER_DAYS, CLIENT_DAYS, CRL_DAYS = 3650, 90, 30, 30
SKEW = timedelta(minutes=5)
"""How much earlier than now what is signed begins to hold: for clocks that are behind."""
RESERVED = ("ca", "crl")
MAX_NAME = 64
"""Characters of a common name: RFC 5280, ub-common-name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,63}")


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was made, and its files."""

    name: str
    certificate: x509.Certificate
    cert: Path
    key: Path | None
    """None where the key is somebody else's, and never was here."""


class Authority:
    """Made by `create` once, opened by `opened` from then on."""

    def __init__(self, store: Store, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.store = store
        self.certificate = certificate
        self._key = key

    def __repr__(self) -> str:
        return f"<Authority {self.certificate.subject.rfc4514_string()} in {self.store.directory}>"

    @classmethod
    def create(
        cls,
        directory: Path,
        *,
        name: str = "",
        days: int = CA_DAYS,
        passphrase: bytes | None = None,
        force: bool = False,
    ) -> Self:
        """A new CA with an empty revocation list; each has a name of its own, unless told otherwise, so that two can be trusted at
        once. CertificateError if one is there already, unless `force`.
        """
        if len(name) > MAX_NAME or not name.isprintable():
            raise CertificateError("make CA", f"its name has up to {MAX_NAME} characters that can be printed")
        store = Store(directory)
        with store.locked(make=True):
            for file in ("ca.key", "ca.pem"):
                if store.path(file).exists() and not force:
                    raise CertificateError(f"write {store.path(file)}", "it is there already; another CA needs another --dir")
            key = ec.generate_private_key(ec.SECP256R1())
            names = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name or f"jobrunner CA {secrets.token_hex(4)}")])
            now = datetime.now(UTC)
            certificate = (
                x509.CertificateBuilder(names, names, key.public_key(), x509.random_serial_number())
                .not_valid_before(now - SKEW)
                .not_valid_after(now + timedelta(days=days))
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(key_usage(sign=True), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                .sign(key, hashes.SHA256())
            )
            store.write("ca.key", key_to_pem(key, passphrase), PRIVATE)
            store.write("ca.pem", to_pem(certificate))
            authority = cls(store, certificate, key)
            authority.sign_revoked([])
        return authority

    @classmethod
    @contextmanager
    def opened(cls, directory: Path, passphrase: bytes | None = None) -> Iterator[Self]:
        """The CA of a directory, for one writer at a time."""
        store = Store(directory)
        with store.locked():
            certificate = _certificate(store, "ca.pem")
            path = store.path("ca.key")
            try:
                key = serialization.load_pem_private_key(store.read("ca.key"), passphrase)
            except TypeError as exc:  # encrypted and no passphrase, or the other way round
                reason = "it is not encrypted" if passphrase else "it is encrypted; give --passphrase-file"
                raise CertificateError(f"read {path}", reason) from exc
            except ValueError as exc:
                raise CertificateError(f"read {path}", "the passphrase is wrong, or it holds no private key") from exc
            if key.public_key() != certificate.public_key():
                raise CertificateError(f"read {path}", f"it does not belong to {store.path('ca.pem')}")
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise CertificateError(f"use {path}", "it is no ECDSA key; `jobrunner certs init` makes a CA that has one")
            yield cls(store, certificate, key)

    def issue(
        self, name: str, profile: Profile, *, days: int | None = None, passphrase: bytes | None = None, force: bool = False
    ) -> Issued:
        """A new key and its certificate, as files NAME.pem and NAME.key. CertificateError if they are there, unless `force`."""
        self._check_free(name, force)
        issued = self._with_new_key(name, profile, days or _days_of(profile), passphrase)
        self.sign_revoked(self.revoked())
        return issued

    def sign(self, name: str, profile: Profile, request: bytes, *, days: int | None = None, force: bool = False) -> Issued:
        """The certificate, NAME.pem, for the key of this signing request (PEM or DER).

        Nothing else is taken from it: what the certificate says is for the CA to say. CertificateError as `issue`, and for what is
        no request, or has a weak key.
        """
        self._check_free(name, force)
        issued = self._for_key(name, profile, days or _days_of(profile), _key_of(request))
        self.sign_revoked(self.revoked())
        return issued

    def renew(self, name: str, *, days: int | None = None, passphrase: bytes | None = None) -> Issued:
        """A certificate that says the same, for as long as the one before, which holds until its own end.

        With a new key, encrypted if the old one is; where the key is not here, for the same key again, unless that is revoked.
        """
        _check_name(name, "renew")
        old = _certificate(self.store, f"{name}.pem")
        life = days or max(1, round((old.not_valid_after_utc - old.not_valid_before_utc - SKEW) / timedelta(days=1)))
        key = self.store.path(f"{name}.key")
        if not key.exists():
            if not self._has_issued(old) or old.serial_number in self._revoked_serials():
                reason = "is revoked, and its key with it" if self._has_issued(old) else "was not issued here"
                raise CertificateError(f"renew {name}", f"its certificate {reason}; `issue --csr --force` takes a new request")
            return self._for_key(name, Profile.of(old), life, old.public_key())
        if b"ENCRYPTED" in self.store.read(key.name) and passphrase is None:
            raise CertificateError(
                f"renew {name}", "its key is encrypted, and so has to be the new one; give --key-passphrase-file"
            )
        return self._with_new_key(name, Profile.of(old), life, passphrase)

    def due(self) -> list[str]:
        """Names whose certificate has less than a third of its life left."""
        now = datetime.now(UTC)
        names = []
        for path in sorted(self.store.directory.glob("*.pem")):
            if path.stem in RESERVED:
                continue
            held = _certificate(self.store, path.name)
            if not path.with_suffix(".key").exists() and (user_of(held) != path.stem or not self._has_issued(held)):
                continue  # a copy of something
            life = held.not_valid_after_utc - held.not_valid_before_utc
            if held.not_valid_after_utc - now < life / 3 and held.serial_number not in self._revoked_serials():
                names.append(path.stem)
        return names

    def _check_free(self, name: str, force: bool) -> None:
        _check_name(name, "issue")
        for path in (self.store.path(f"{name}.pem"), self.store.path(f"{name}.key")):
            if path.exists() and not force:
                raise CertificateError(f"write {path}", "it is there already; `renew` renews it, --force overwrites")

    def _has_issued(self, certificate: x509.Certificate) -> bool:
        return self.store.path(f"issued/{certificate.serial_number:x}.pem").exists()

    def revoke(self, name: str) -> list[int]:
        """Revoke every certificate of a name that has not expired; their serials. `name` may be a serial, hexadecimal."""
        now = datetime.now(UTC)
        held = [_certificate(self.store, f"issued/{path.name}") for path in sorted(self.store.path("issued").glob("*.pem"))]
        current = self.store.path(f"{name}.pem")
        user = user_of(_certificate(self.store, current.name)) if current.exists() else name
        found = [one.serial_number for one in held if user_of(one) == user and one.not_valid_after_utc > now]
        if not found and re.fullmatch(r"[0-9A-Fa-f]{8,40}", name):
            found = [int(name, 16)]
        if not found:
            raise CertificateError("revoke certificate", f'no certificate of "{name}" holds; `show` lists them')
        known = self._revoked_serials()
        builder = x509.RevokedCertificateBuilder().revocation_date(now)
        added = [builder.serial_number(serial).build() for serial in found if serial not in known]
        self.sign_revoked([*self.revoked(), *added])
        return found

    def revoked(self) -> list[x509.RevokedCertificate]:
        """What the list has now."""
        return list(self._list() or ())

    def sign_revoked(self, entries: Sequence[x509.RevokedCertificate], days: int = CRL_DAYS) -> None:
        """Write the list anew, good for so many days from now."""
        before = self._list()
        number = before.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number if before is not None else 0
        now = datetime.now(UTC)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            x509.CertificateRevocationListBuilder(self.certificate.subject)
            .last_update(now - SKEW)
            .next_update(now + timedelta(days=days))
            .add_extension(x509.CRLNumber(number + 1), critical=False)
            .add_extension(identifier, critical=False)
        )
        for entry in entries:
            builder = builder.add_revoked_certificate(entry)
        self.store.write("crl.pem", to_pem(builder.sign(self._key, hashes.SHA256())))

    def _list(self) -> x509.CertificateRevocationList | None:
        if not self.store.path("crl.pem").exists():
            return None
        try:
            held = x509.load_pem_x509_crl(self.store.read("crl.pem"))
        except ValueError as exc:
            reason = "it holds no revocation list in PEM form; remove it, and revoke again what was revoked"
            raise CertificateError(f"read {self.store.path('crl.pem')}", reason) from exc
        # One of a CA that was here before has nothing to say of this one.
        return held if held.is_signature_valid(self._key.public_key()) else None

    def _revoked_serials(self) -> set[int]:
        return {entry.serial_number for entry in self.revoked()}

    def _with_new_key(self, name: str, profile: Profile, days: int, passphrase: bytes | None) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(profile, days, key.public_key())
        self.store.write_pair(name, to_pem(certificate), key_to_pem(key, passphrase))
        return Issued(name, certificate, self.store.path(f"{name}.pem"), self.store.path(f"{name}.key"))

    def _for_key(self, name: str, profile: Profile, days: int, key: CertificatePublicKeyTypes) -> Issued:
        certificate = self._signed(profile, days, key)
        # Order: a key that does not belong to it goes first.
        if not self._has_key(name, key):
            self.store.remove(f"{name}.key")
        self.store.write(f"{name}.pem", to_pem(certificate))
        return Issued(name, certificate, self.store.path(f"{name}.pem"), None)

    def _has_key(self, name: str, key: CertificatePublicKeyTypes) -> bool:
        """Whether the file NAME.key is there and belongs to this one. CertificateError if nobody can tell."""
        path = self.store.path(f"{name}.key")
        if not path.exists():
            return False
        try:
            return serialization.load_pem_private_key(self.store.read(path.name), None).public_key() == key
        except TypeError as exc:
            raise CertificateError(f"write {name}.pem", f"{path} is encrypted, and may be the key of it; move it away") from exc
        except (ValueError, UnsupportedAlgorithm):
            return False

    def _signed(self, profile: Profile, days: int, key: CertificatePublicKeyTypes) -> x509.Certificate:
        """A certificate, which is among those that can be revoked from here on."""
        now = datetime.now(UTC)
        end = now + timedelta(days=days)
        if end > self.certificate.not_valid_after_utc:
            until = self.certificate.not_valid_after_utc.date()
            raise CertificateError("issue certificate", f"the CA itself ends on {until}; give fewer --days, or make a new CA")
        if not 0 < len(profile.user) <= MAX_NAME:
            raise CertificateError("issue certificate", f"a user's name has 1 to {MAX_NAME} characters")
        builder = (
            x509.CertificateBuilder(self.certificate.subject, profile.names(), key, x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(sign=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for extension, critical in profile.extensions():
            builder = builder.add_extension(extension, critical=critical)
        certificate = builder.sign(self._key, hashes.SHA256())
        self.store.write(f"issued/{certificate.serial_number:x}.pem", to_pem(certificate))
        return certificate


def _check_name(name: str, verb: str) -> None:
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise CertificateError(f"{verb} certificate", f'"{name}" is no name for a file')


def _certificate(store: Store, file: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(store.read(file))
    except ValueError as exc:
        raise CertificateError(f"read {store.path(file)}", "it holds no certificate in PEM form") from exc


def _days_of(profile: Profile) -> int:
    return SERVER_DAYS if profile.hosts else CLIENT_DAYS


def _key_of(request: bytes) -> CertificatePublicKeyTypes:
    verb = "sign request"
    try:
        pem = b"-----BEGIN" in request
        asked = x509.load_pem_x509_csr(request) if pem else x509.load_der_x509_csr(request)
        key, valid = asked.public_key(), asked.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise CertificateError(verb, "it is no certificate signing request") from exc
    if not valid:
        raise CertificateError(verb, "its signature is wrong: who made it may not have the key")
    if (isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048) or isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
        return key
    raise CertificateError(verb, "its key is weak; take ECDSA P-256")
