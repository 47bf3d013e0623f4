"""The two TLS contexts, server's and client's.

TLS 1.3 only (RFC 8446), its cipher suites are not configurable. Each side requires the other's certificate, from the one CA that it
is given: no system CA is trusted. Nothing resumes: a session from before a certificate was revoked would not be checked again.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from jobrunner.errors import ConfigError

__all__ = ["client_context", "server_context"]

FilePath = Path | str


def server_context(
    ca: FilePath, cert: FilePath, key: FilePath, *, crl: FilePath | None = None, passphrase_file: FilePath | None = None
) -> ssl.SSLContext:
    """For the server: a client without a certificate from `ca` is refused. Raises ConfigError: which file, and why.

    With `crl`, so is one that is revoked, by the list of each CA of its chain. A missing or expired list refuses all.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, ca, cert, key, passphrase_file)
    context.num_tickets = 0
    if crl is not None:
        _check_readable("revocation list", crl)
        if b"-----BEGIN X509 CRL-----" not in Path(crl).read_bytes():
            raise ConfigError(f"revocation list {crl}", "it holds none in PEM form")
        try:
            context.load_verify_locations(cafile=crl)
        except ssl.SSLError as exc:
            raise ConfigError(f"revocation list {crl}", exc.reason or str(exc)) from exc
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    return context


def client_context(ca: FilePath, cert: FilePath, key: FilePath, *, passphrase_file: FilePath | None = None) -> ssl.SSLContext:
    """For the client: the server's certificate must be from `ca` and name the host. Raises ConfigError: which file, and why."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, ca, cert, key, passphrase_file)
    context.check_hostname = True
    return context


def _context(protocol: int, ca: FilePath, cert: FilePath, key: FilePath, passphrase_file: FilePath | None) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    # RFC 5280 in full; Python 3.13 sets this by itself only in create_default_context.
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["h2"])
    for kind, path in (("CA certificate", ca), ("certificate", cert), ("key", key)):
        _check_readable(kind, path)
    try:
        context.load_verify_locations(cafile=ca)
    except ssl.SSLError as exc:
        raise ConfigError(f"CA certificate {ca}", "it holds no certificate in PEM form") from exc
    # Without a passphrase: OpenSSL would ask for one on the terminal.
    password = _no_password if passphrase_file is None else _passphrase(passphrase_file)
    try:
        context.load_cert_chain(cert, key, password=password)
    except _Encrypted as exc:
        raise ConfigError(f"key {key}", "it is encrypted, and no passphrase file is given") from exc
    except ssl.SSLError as exc:
        if passphrase_file is not None and b"ENCRYPTED" in Path(key).read_bytes() and exc.reason != "KEY_VALUES_MISMATCH":
            raise ConfigError(f"key {key}", f"the passphrase in {passphrase_file} does not open it") from exc
        raise _explain(exc, cert, key) from exc
    return context


class _Encrypted(Exception):
    pass


def _no_password() -> str:
    raise _Encrypted


def _passphrase(file: FilePath) -> bytes:
    _check_readable("passphrase file", file)
    lines = Path(file).read_bytes().splitlines()
    if not lines or not lines[0]:
        raise ConfigError(f"passphrase file {file}", "its first line is empty")
    return lines[0]


def _check_readable(kind: str, path: FilePath) -> None:
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{kind} {path}", getattr(exc, "strerror", None) or str(exc)) from exc


def _explain(exc: ssl.SSLError, cert: FilePath, key: FilePath) -> ConfigError:
    """load_cert_chain(3) tells of two files in one error: which of them is it?"""
    if exc.reason == "KEY_VALUES_MISMATCH":
        return ConfigError(f"key {key}", f"it does not belong to certificate {cert}")
    if b"-----BEGIN CERTIFICATE-----" not in Path(cert).read_bytes():
        return ConfigError(f"certificate {cert}", "it holds no certificate in PEM form")
    if b"PRIVATE KEY-----" not in Path(key).read_bytes():
        return ConfigError(f"key {key}", "it holds no private key in PEM form")
    return ConfigError(f"certificate {cert} with key {key}", exc.reason or str(exc))
