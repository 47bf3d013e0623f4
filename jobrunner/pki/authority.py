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
from ipaddress import ip_address
from pathlib import Path
from typing import Self, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobrunner.errors import CertificateError
from jobrunner.pki.store import PRIVATE, Store, key_to_pem, to_pem

__all__ = ["CA_DAYS", "CLIENT_DAYS", "CRL_DAYS", "SERVER_DAYS", "Authority", "Issued", "Profile"]

CA_DAYS, SERVER_DAYS, CLIENT_DAYS, CRL_DAYS = 3650, 90, 30, 30
SKEW = timedelta(minutes=5)
"""How much earlier than now what is signed begins to hold: for clocks that are behind."""
RESERVED = ("ca", "crl")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,63}")
_HOST = re.compile(
    r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)*"
)


@dataclass(frozen=True, slots=True)
class Profile:
    """What a certificate is to say. A client has a `unit`, its role; a server has `hosts`, names and addresses."""

    user: str
    unit: str = ""
    hosts: tuple[str, ...] = ()

    def names(self) -> x509.Name:
        units = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, self.unit)] if self.unit else []
        return x509.Name([*units, x509.NameAttribute(NameOID.COMMON_NAME, self.user)])

    def extensions(self) -> list[tuple[x509.ExtensionType, bool]]:
        use = ExtendedKeyUsageOID.SERVER_AUTH if self.hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        found: list[tuple[x509.ExtensionType, bool]] = [(x509.ExtendedKeyUsage([use]), False)]
        if self.hosts:
            found.append((x509.SubjectAlternativeName([_general_name(host) for host in self.hosts]), False))
        return found


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was made, and its files."""

    name: str
    certificate: x509.Certificate
    cert: Path
    key: Path


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
                .add_extension(_usage(sign=True), critical=True)
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
            certificate = x509.load_pem_x509_certificate(store.read("ca.pem"))
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
            yield cls(store, certificate, cast("ec.EllipticCurvePrivateKey", key))

    def issue(
        self, name: str, profile: Profile, *, days: int | None = None, passphrase: bytes | None = None, force: bool = False
    ) -> Issued:
        """A new key and its certificate, as files NAME.pem and NAME.key. CertificateError if they are there, unless `force`."""
        if not _NAME.fullmatch(name) or name in RESERVED:
            raise CertificateError("issue certificate", f'"{name}" is no name for a file')
        for path in (self.store.path(f"{name}.pem"), self.store.path(f"{name}.key")):
            if path.exists() and not force:
                raise CertificateError(f"write {path}", "it is there already; `renew` renews it, --force overwrites")
        issued = self._issue(name, profile, days or (SERVER_DAYS if profile.hosts else CLIENT_DAYS), passphrase)
        self.sign_revoked(self.revoked())
        return issued

    def renew(self, name: str, *, days: int | None = None, passphrase: bytes | None = None) -> Issued:
        """A new key and certificate that says the same, for as long as the one before, which holds until its own end."""
        old = self._load(f"{name}.pem")
        units = [str(unit.value) for unit in old.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)]
        users = [str(user.value) for user in old.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        lifetime = days or max(1, round((old.not_valid_after_utc - old.not_valid_before_utc - SKEW) / timedelta(days=1)))
        return self._issue(name, Profile(users[0], units[0] if units else "", _hosts(old)), lifetime, passphrase)

    def due(self) -> list[str]:
        """Names whose certificate has less than a third of its life left."""
        now = datetime.now(UTC)
        names = []
        for path in sorted(self.store.directory.glob("*.pem")):
            if path.stem in RESERVED or not path.with_suffix(".key").exists():
                continue
            held = self._load(path.name)
            life = held.not_valid_after_utc - held.not_valid_before_utc
            if held.not_valid_after_utc - now < life / 3 and held.serial_number not in self._revoked_serials():
                names.append(path.stem)
        return names

    def revoke(self, name: str) -> list[int]:
        """Revoke every certificate of a name that has not expired; their serials. `name` may be a serial, hexadecimal."""
        now = datetime.now(UTC)
        held = [x509.load_pem_x509_certificate(path.read_bytes()) for path in sorted(self.store.path("issued").glob("*.pem"))]
        current = self.store.path(f"{name}.pem")
        user = _user(self._load(current.name)) if current.exists() else name
        found = [one.serial_number for one in held if _user(one) == user and one.not_valid_after_utc > now]
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
        held = x509.load_pem_x509_crl(self.store.read("crl.pem"))
        # One of a CA that was here before has nothing to say of this one.
        return held if held.is_signature_valid(self._key.public_key()) else None

    def _revoked_serials(self) -> set[int]:
        return {entry.serial_number for entry in self.revoked()}

    def _load(self, file: str) -> x509.Certificate:
        try:
            return x509.load_pem_x509_certificate(self.store.read(file))
        except ValueError as exc:
            raise CertificateError(f"read {self.store.path(file)}", "it holds no certificate in PEM form") from exc

    def _issue(self, name: str, profile: Profile, days: int, passphrase: bytes | None) -> Issued:
        now = datetime.now(UTC)
        end = now + timedelta(days=days)
        if end > self.certificate.not_valid_after_utc:
            until = self.certificate.not_valid_after_utc.date()
            raise CertificateError("issue certificate", f"the CA itself ends on {until}; give fewer --days, or make a new CA")
        if not 0 < len(profile.user) <= 64:
            raise CertificateError("issue certificate", "a user's name has 1 to 64 characters")
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder(self.certificate.subject, profile.names(), key.public_key(), x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for extension, critical in profile.extensions():
            builder = builder.add_extension(extension, critical=critical)
        certificate = builder.sign(self._key, hashes.SHA256())
        # Order: what can be revoked first, then what can be used.
        self.store.write(f"issued/{certificate.serial_number:x}.pem", to_pem(certificate))
        self.store.write_pair(name, to_pem(certificate), key_to_pem(key, passphrase))
        return Issued(name, certificate, self.store.path(f"{name}.pem"), self.store.path(f"{name}.key"))


def _user(certificate: x509.Certificate) -> str:
    return "".join(str(one.value) for one in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME))


def _hosts(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return (*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress)))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise CertificateError("issue certificate", f'"{host}" is no host name or address') from None
        return x509.DNSName(host)


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
