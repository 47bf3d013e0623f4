"""Certificates made by the command `openssl` alone: the server is not judged with what this project itself makes."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.support.certs import Pair

CONFIG = """
[ca]
default_ca = it
[it]
database = {dir}/index
serial = {dir}/serial
new_certs_dir = {dir}
certificate = {dir}/ca.pem
private_key = {dir}/ca.key
default_md = sha256
default_crl_days = 2
crl_extensions = crl
unique_subject = no
policy = any
preserve = yes
[any]
commonName = optional
organizationalUnitName = optional
[crl]
authorityKeyIdentifier = keyid
[req]
distinguished_name = dn
[dn]
[root]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
"""
DAY = timedelta(days=1)


class OpenSslCa:
    """A CA in a directory."""

    def __init__(self, directory: Path, subject: str = "/CN=openssl CA") -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.pem, self.crl = directory / "ca.pem", directory / "crl.pem"
        (directory / "cnf").write_text(CONFIG.format(dir=directory))
        (directory / "index").touch()
        (directory / "serial").write_text("1000\n")
        self._make("ca", subject, "-x509", "-days", "3", "-extensions", "root", out="ca.pem")
        self.sign_revoked()

    def issue(
        self,
        name: str,
        subject: str,
        *,
        use: str = "clientAuth",
        start: timedelta = -DAY,
        end: timedelta = DAY,
        hosts: str = "",
        key_usage: str = "digitalSignature",
    ) -> Pair:
        """A certificate for this use, `clientAuth` for instance, or none; valid from and to so long after now."""
        self._make(name, subject, out=f"{name}.csr")
        extensions = [CONFIG.partition("[leaf]")[2].replace("digitalSignature", key_usage)]
        extensions += [f"extendedKeyUsage = {use}"] if use else []
        extensions += [f"subjectAltName = {hosts}"] if hosts else []
        (self.directory / "ext").write_text("\n".join(extensions))
        times = [f"{datetime.now(UTC) + moment:%Y%m%d%H%M%SZ}" for moment in (start, end)]
        files = ("-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", "ext")
        self._run("ca", "-batch", "-notext", "-config", "cnf", *files, "-startdate", times[0], "-enddate", times[1])
        return Pair(self.directory / f"{name}.pem", self.directory / f"{name}.key")

    def self_signed(self, name: str, subject: str) -> Pair:
        self._make(name, subject, "-x509", "-days", "2", "-extensions", "leaf", out=f"{name}.pem")
        return Pair(self.directory / f"{name}.pem", self.directory / f"{name}.key")

    def revoke(self, pair: Pair) -> None:
        self._run("ca", "-config", "cnf", "-revoke", str(pair.cert))
        self.sign_revoked()

    def sign_revoked(self) -> None:
        self._run("ca", "-gencrl", "-config", "cnf", "-out", "crl.pem")

    def _make(self, name: str, subject: str, *how: str, out: str) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key")
        self._run("req", "-new", "-config", "cnf", *key, "-subj", subject, "-out", out, *how)

    def _run(self, *words: str) -> None:
        done = subprocess.run(["openssl", *words], cwd=self.directory, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"openssl {' '.join(words)}\n{done.stderr}"
