"""Throw-away certificates for `jobrunnerd dev`, `make demo`, the container and tests: a CA of `jobrunner.pki`, good for a year."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from jobrunner.errors import CertificateError
from jobrunner.pki import Authority, Profile

__all__ = ["CLIENTS", "HOSTS", "make_certs"]

CLIENTS: Mapping[str, str] = MappingProxyType({"admin": "admin", "viewer": "viewer"})
HOSTS = ("localhost", "127.0.0.1", "::1")
_RESERVED = ("ca", "server")
_DAYS = 365


def make_certs(out: Path, clients: Mapping[str, str] = CLIENTS, hosts: Sequence[str] = HOSTS, *, force: bool = False) -> None:
    """Write `ca`, `server` and each client's `.pem` (certificate, 0644) and `.key` (private key, 0600) below `out`, and `crl.pem`.

    `clients` maps a user to a role; `hosts` are the names and addresses that the server is reached by. Raises CertificateError
    for a user that is no file name, and before anything is written if a file is there already, unless `force`.
    """
    for user in clients:
        if user in _RESERVED:
            raise CertificateError("make certificate", f'"{user}" is no name for a client')
    paths = [out / f"{name}{suffix}" for name in (*_RESERVED, *clients) for suffix in (".pem", ".key")]
    taken = [path for path in paths if path.exists()]
    if taken and not force:
        raise CertificateError(f"write {taken[0]}", "it is there already")
    Authority.create(out, name="jobrunner throw-away CA", days=_DAYS + 1, force=force)
    with Authority.opened(out) as authority:
        authority.issue("server", Profile("jobrunnerd", hosts=tuple(hosts)), days=_DAYS, force=force)
        for user, role in clients.items():
            authority.issue(user, Profile(user, role), days=_DAYS, force=force)
        authority.sign_revoked(authority.revoked(), days=_DAYS)
