"""The two TLS contexts, server's and client's, and a hook that tells why a handshake failed.

TLS 1.3 only (RFC 8446), its cipher suites are not configurable. Each side requires the other's certificate, from the one CA that it
is given: no system CA is trusted. Nothing resumes: a session from before a certificate was revoked would not be checked again.
"""

from __future__ import annotations

import functools
import ssl
from asyncio import sslproto
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobrunner.errors import ConfigError

__all__ = ["client_context", "install_handshake_logging", "server_context"]

FilePath = Path | str
HandshakeFailed = Callable[[Any, Exception], None]
"""Called with the peer's address, as the socket gives it (None if it is gone already), and the error."""


def server_context(ca: FilePath, cert: FilePath, key: FilePath) -> ssl.SSLContext:
    """For the server: a client without a certificate from `ca` is refused. Raises ConfigError: which file, and why."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, ca, cert, key)
    context.num_tickets = 0
    return context


def client_context(ca: FilePath, cert: FilePath, key: FilePath) -> ssl.SSLContext:
    """For the client: the server's certificate must be from `ca` and name the host. Raises ConfigError: which file, and why."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, ca, cert, key)
    context.check_hostname = True
    return context


def _context(protocol: int, ca: FilePath, cert: FilePath, key: FilePath) -> ssl.SSLContext:
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
    try:
        # The password: OpenSSL would ask for one on the terminal.
        context.load_cert_chain(cert, key, password=_no_password)
    except _Encrypted as exc:
        raise ConfigError(f"key {key}", "it is encrypted") from exc
    except ssl.SSLError as exc:
        raise _explain(exc, cert, key) from exc
    return context


class _Encrypted(Exception):
    pass


def _no_password() -> str:
    raise _Encrypted


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


def install_handshake_logging(callback: HandshakeFailed) -> Callable[[], None]:
    """Have every failed TLS handshake of this process told to `callback`, and its alert sent; returns what takes it back.

    asyncio drops both (python/cpython#98078, until Python 3.15): a refused client sees a lost connection instead of the reason, and
    the server's log says nothing. The hook is a private method: where it is not what is known, nothing is installed, and both sides
    do what asyncio does by itself.
    """
    protocol: Any = sslproto.SSLProtocol
    original = getattr(protocol, "_on_handshake_complete", None)
    if original is None or not hasattr(protocol, "_process_outgoing"):
        return lambda: None

    @functools.wraps(original)
    def told(self: Any, handshake_exc: Exception | None) -> Any:
        if handshake_exc is not None and getattr(self, "_server_side", False):
            transport = getattr(self, "_transport", None)
            callback(transport.get_extra_info("peername") if transport is not None else None, handshake_exc)
            if isinstance(handshake_exc, ssl.SSLError) and transport is not None:
                self._process_outgoing()  # Order: before the original, which closes the transport without sending the alert.
        return original(self, handshake_exc)

    def uninstall() -> None:
        if protocol._on_handshake_complete is told:
            protocol._on_handshake_complete = original

    protocol._on_handshake_complete = told
    return uninstall
