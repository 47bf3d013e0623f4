"""What a certificate is, and what is wrong or weak about it: for `jobrunner certs show`, and the server's own warnings."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobrunner.errors import CertificateError

__all__ = ["Described", "describe"]

ROLES = ("admin", "viewer")
WEAK_HASHES = ("md5", "sha1")
T = TypeVar("T", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class Described:
    """One certificate of a file."""

    path: str
    kind: str
    """`admin`, `viewer`, `server`, `CA`, or `-` for what is none of them."""
    user: str
    hosts: tuple[str, ...]
    serial: str
    not_before: datetime
    not_after: datetime
    warnings: tuple[str, ...]


def describe(path: Path, revoked: Collection[int] = (), now: datetime | None = None) -> list[Described]:
    """Every certificate of a PEM file. `revoked` are serial numbers. CertificateError if it cannot be read."""
    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as exc:
        raise CertificateError(f"read {path}", exc.strerror or str(exc)) from exc
    except ValueError as exc:
        raise CertificateError(f"read {path}", "it holds no certificate in PEM form") from exc
    now = now or datetime.now(UTC)
    return [_describe(path, each, revoked, now) for each in certificates]


def _describe(path: Path, certificate: x509.Certificate, revoked: Collection[int], now: datetime) -> Described:
    units = [str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)]
    users = [str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    constraints = _extension(certificate, x509.BasicConstraints)
    use = set(_extension(certificate, x509.ExtendedKeyUsage) or ())
    names = _extension(certificate, x509.SubjectAlternativeName)
    hosts: tuple[str, ...] = ()
    if names is not None:
        hosts = (*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress)))
    kind = "-"
    if constraints is not None and constraints.ca:
        kind = "CA"
    elif ExtendedKeyUsageOID.SERVER_AUTH in use:
        kind = "server"
    elif units in (["admin"], ["viewer"]):
        kind = units[0]
    warnings = [*_times(certificate, now), *_strength(certificate), *_key_file(path, certificate)]
    if certificate.serial_number in revoked:
        warnings.append("it is revoked")
    if kind == "CA":
        warnings += _of_ca(certificate)
    else:
        warnings += _of_leaf(certificate, kind, use, hosts, users, units)
    return Described(
        str(path),
        kind,
        ", ".join(users),
        hosts,
        f"{certificate.serial_number:x}",
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        tuple(warnings),
    )


def _times(certificate: x509.Certificate, now: datetime) -> Iterator[str]:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        yield f"it is not valid before {begin:%Y-%m-%d %H:%M} UTC"
    elif now > end:
        yield f"it has expired on {end:%Y-%m-%d %H:%M} UTC: renew it"
    elif end - now < min((end - begin) / 3, timedelta(days=60)):
        yield f"it expires in {(end - now) / timedelta(days=1):.1f} days: renew it"


def _strength(certificate: x509.Certificate) -> Iterator[str]:
    key = certificate.public_key()
    match key:
        case rsa.RSAPublicKey():
            if key.key_size < 2048:
                yield f"its key is weak: RSA with {key.key_size} bits; make one with ECDSA P-256"
        case ec.EllipticCurvePublicKey():
            if key.curve.key_size < 256:
                yield f"its key is weak: the curve {key.curve.name}; make one with ECDSA P-256"
        case ed25519.Ed25519PublicKey() | ed448.Ed448PublicKey():
            pass
        case _:
            yield "its key is of a kind that TLS 1.3 does not know; make one with ECDSA P-256"
    digest = certificate.signature_hash_algorithm
    if digest is not None and digest.name in WEAK_HASHES:
        yield f"its signature is weak: {digest.name}; issue it again with SHA-256"


def _key_file(path: Path, certificate: x509.Certificate) -> Iterator[str]:
    """The key that lies beside it, if one does and this process may read it."""
    key = path.with_suffix(".key")
    try:
        mode, data = key.stat().st_mode, key.read_bytes()
    except OSError:
        return
    if mode & 0o077:
        yield f"{key} is open to others than its owner: chmod 600"
    try:
        held = serialization.load_pem_private_key(data, None)
    except (TypeError, ValueError):  # encrypted, or none
        return
    if held.public_key() != certificate.public_key():
        yield f"{key} does not belong to it"


def _of_ca(certificate: x509.Certificate) -> Iterator[str]:
    usage = _extension(certificate, x509.KeyUsage)
    if usage is None or not usage.key_cert_sign:
        yield "its key usage does not allow it to sign certificates: it will be refused"
    elif not usage.crl_sign:
        yield "its key usage does not allow it to sign a revocation list"
    if _extension(certificate, x509.SubjectKeyIdentifier) is None:
        yield "it has no subject key identifier: it will be refused"


def _of_leaf(
    certificate: x509.Certificate,
    kind: str,
    use: set[x509.ObjectIdentifier],
    hosts: tuple[str, ...],
    users: list[str],
    units: list[str],
) -> Iterator[str]:
    if not use:
        yield "it does not say what it is for (extended key usage): it will be refused"
    elif {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= use:
        yield "it is for servers and for clients: who has it can pose as the server"
    if kind == "server":
        if not hosts:
            yield "it names no host (subject alternative name): clients will refuse it"
    elif len(units) != 1 or units[0] not in ROLES:
        yield f"its organizational unit (OU) is not exactly one of {', '.join(ROLES)}: it may do nothing"
    elif len(users) != 1 or not users[0]:
        yield "it has not exactly one common name (CN): it may do nothing"
    if _extension(certificate, x509.AuthorityKeyIdentifier) is None:
        yield "it has no authority key identifier: it will be refused"


def _extension(certificate: x509.Certificate, kind: type[T]) -> T | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
