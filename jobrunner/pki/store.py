"""The files of a CA's directory. Each is replaced whole: written beside, synced, renamed.

    ca.pem ca.key       the CA
    crl.pem             what it has revoked
    NAME.pem NAME.key   the newest certificate of a name
    issued/SERIAL.pem   every certificate that was issued

A renewed pair is two files. Order: the certificate is written as `.next`, then the key, then the certificate is renamed, then the
key. So a `.next` key without such a certificate is whole, and that of the certificate in place; `locked` ends what a crash left, so
that certificate and key belong together once nobody writes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jobrunner.errors import CertificateError

__all__ = ["Store", "read_passphrase"]

PUBLIC, PRIVATE = 0o644, 0o600
NEXT = ".next"
MAX_PASSPHRASE = 1023
"""Bytes that OpenSSL takes."""


class Store:
    """A CA's directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __repr__(self) -> str:
        return f"<Store {self.directory}>"

    def path(self, name: str) -> Path:
        return self.directory / name

    @contextmanager
    def locked(self, *, make: bool = False) -> Iterator[None]:
        """The only writer, until it is left; leftovers of one that crashed are ended first. `make` makes the directory."""
        try:
            if make:
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.path("issued").mkdir(mode=0o700, exist_ok=True)
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise CertificateError(f"open {self.directory}", f"{exc.strerror}; `jobrunner certs init` makes a CA") from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._finish()
            yield
        except OSError as exc:
            raise CertificateError(f"write to {self.directory}", exc.strerror or str(exc)) from exc
        finally:
            os.close(fd)

    def read(self, name: str) -> bytes:
        """CertificateError if it cannot be read."""
        try:
            return self.path(name).read_bytes()
        except OSError as exc:
            remedy = "; `jobrunner certs init` makes a CA" if name.startswith("ca.") else ""
            raise CertificateError(f"read {self.path(name)}", f"{exc.strerror}{remedy}") from exc

    def write(self, name: str, data: bytes, mode: int = PUBLIC) -> None:
        self._write_next(name, data, mode)
        os.replace(self.path(name + NEXT), self.path(name))  # noqa: PTH105
        self._sync()

    def remove(self, name: str) -> None:
        """If it is there."""
        self.path(name).unlink(missing_ok=True)
        self._sync()

    def write_pair(self, name: str, certificate: bytes, key: bytes) -> None:
        """See the module for the order."""
        self._write_next(f"{name}.pem", certificate, PUBLIC)
        self._write_next(f"{name}.key", key, PRIVATE)
        for file in (f"{name}.pem", f"{name}.key"):
            os.replace(self.path(file + NEXT), self.path(file))  # noqa: PTH105
        self._sync()

    def _write_next(self, name: str, data: bytes, mode: int) -> None:
        path = self.path(name + NEXT)
        path.unlink(missing_ok=True)
        # O_EXCL and the mode at birth: never readable by others, not even for a moment.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _sync(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _finish(self) -> None:
        """A key whose certificate has been renamed already is renamed too; anything else that is half-written is dropped."""
        # Order: keys first, while it can be seen whether their certificates are beside them.
        for path in sorted(self.directory.glob(f"*{NEXT}")):
            target = path.with_name(path.name.removesuffix(NEXT))
            certificate = target.with_suffix(".pem")
            if target.suffix == ".key" and not certificate.with_name(certificate.name + NEXT).exists() and certificate.exists():
                path.replace(target)
            else:
                path.unlink()


def read_passphrase(path: Path | None) -> bytes | None:
    """The first line of a file; None for no file."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_PASSPHRASE + 2).splitlines()
    except OSError as exc:
        raise CertificateError(f"read passphrase {path}", exc.strerror or str(exc)) from exc
    if not lines or not lines[0]:
        raise CertificateError(f"read passphrase {path}", "its first line is empty")
    if len(lines[0]) > MAX_PASSPHRASE:
        raise CertificateError(f"read passphrase {path}", f"its first line is longer than {MAX_PASSPHRASE} bytes")
    return lines[0]


def key_to_pem(key: ec.EllipticCurvePrivateKey, passphrase: bytes | None) -> bytes:
    how = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def to_pem(certificate: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
