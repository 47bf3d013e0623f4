"""Throw-away certificates for `jobrunnerd dev`, `make demo` and tests: a CA of their own, EC P-256 keys, nothing that revokes.

A client's organizational unit (OU) is its role and its common name (CN) is the user, as the server reads them. The server's
certificate has a random OU, which is no role, so that it opens nothing when it is used as a client's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType

import trustme

from jobrunner.errors import JobRunnerError

__all__ = ["CLIENTS", "HOSTS", "make_certs"]

CLIENTS: Mapping[str, str] = MappingProxyType({"admin": "admin", "viewer": "viewer"})
HOSTS = ("localhost", "127.0.0.1", "::1")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_RESERVED = ("ca", "server")
_LIFETIME = timedelta(days=365)


def make_certs(out: Path, clients: Mapping[str, str] = CLIENTS, hosts: Sequence[str] = HOSTS, *, force: bool = False) -> None:
    """Write `ca`, `server` and each client's `.pem` (certificate, 0644) and `.key` (private key, 0600) below `out`.

    `clients` maps a user to a role; `hosts` are the names and addresses that the server is reached by. Raises JobRunnerError for a
    user that is no file name, and before anything is written if a file is there already, unless `force`.
    """
    for user in clients:
        if not _NAME.fullmatch(user) or user in _RESERVED:
            raise JobRunnerError(f'cannot make certificate: "{user}" is no name for a client')
    paths = [out / f"{name}{suffix}" for name in (*_RESERVED, *clients) for suffix in (".pem", ".key")]
    taken = [path for path in paths if path.exists()]
    if taken and not force:
        raise JobRunnerError(f"cannot write {taken[0]}: it is there already")
    ca = trustme.CA(organization_name="jobrunner dev", organization_unit_name="throw-away CA")
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(out, "ca", [ca.cert_pem], ca.private_key_pem)
        server = _issue(ca, *hosts, common_name="jobrunnerd")
        _write(out, "server", server.cert_chain_pems, server.private_key_pem)
        for user, role in clients.items():
            leaf = _issue(ca, f"{user}@localhost", common_name=user, organization_unit_name=role)
            _write(out, user, leaf.cert_chain_pems, leaf.private_key_pem)
    except OSError as error:
        raise JobRunnerError(f"cannot write certificates to {out}: {error.strerror}") from error


def _issue(ca: trustme.CA, *identities: str, common_name: str, organization_unit_name: str | None = None) -> trustme.LeafCert:
    return ca.issue_cert(
        *identities,
        common_name=common_name,
        organization_name="jobrunner dev",
        organization_unit_name=organization_unit_name,
        not_after=datetime.now(UTC) + _LIFETIME,
    )


def _write(out: Path, name: str, chain: Iterable[trustme.Blob], key: trustme.Blob) -> None:
    """Write one pair; the key is never readable by others, not even for a moment."""
    (out / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in chain))
    path = out / f"{name}.key"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600, exist_ok=False)
    path.write_bytes(key.bytes())
