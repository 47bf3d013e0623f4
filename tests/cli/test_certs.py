"""`jobrunner certs`, judged by OpenSSL's own command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jobrunner.errors import CertificateError
from jobrunner.pki import Authority, Profile
from jobrunner_cli.main import run

pytestmark = pytest.mark.requires("command:openssl")


@pytest.fixture
def ca(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    directory = tmp_path / "certs"
    assert run(["certs", "init", "--dir", str(directory)]) == 0
    capfd.readouterr()
    return directory


def certs(ca: Path, *words: str) -> int:
    return run(["certs", words[0], "--dir", str(ca), *words[1:]])


def openssl(*words: object) -> str:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, timeout=20, check=False)
    return done.stdout + done.stderr


def verified(ca: Path, name: str, purpose: str) -> str:
    """OpenSSL's verdict, as strict as it can be, with the revocation list."""
    strict = ("-x509_strict", "-crl_check", "-CRLfile", ca / "crl.pem", "-CAfile", ca / "ca.pem")
    return openssl("verify", *strict, "-purpose", purpose, ca / f"{name}.pem")


def test_what_is_issued_is_good_for_its_purpose_and_for_no_other(ca: Path) -> None:
    assert certs(ca, "issue", "server", "jobs.example", "--host", "10.1.2.3") == 0
    assert certs(ca, "issue", "viewer", "carol") == 0
    assert verified(ca, "jobs.example", "sslserver").endswith(": OK\n")
    assert verified(ca, "carol", "sslclient").endswith(": OK\n")
    assert "unsuitable certificate purpose" in verified(ca, "jobs.example", "sslclient")
    assert "unsuitable certificate purpose" in verified(ca, "carol", "sslserver")
    names = openssl("x509", "-in", ca / "jobs.example.pem", "-noout", "-subject", "-ext", "subjectAltName")
    assert "CN = jobs.example" in names and "OU" not in names
    assert "DNS:jobs.example, IP Address:10.1.2.3" in names
    assert "subject=OU = viewer, CN = carol" in openssl("x509", "-in", ca / "carol.pem", "-noout", "-subject")
    assert "prime256v1" in openssl("x509", "-in", ca / "carol.pem", "-noout", "-text")


def test_keys_are_their_owners_alone_whatever_the_umask_is(ca: Path) -> None:
    before = os.umask(0)
    try:
        assert certs(ca, "issue", "admin", "alice") == 0
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in ca.glob("*.key")} == {"ca.key": 0o600, "alice.key": 0o600}
    assert not list(ca.glob("*.next"))


def test_a_key_is_not_overwritten_unasked(ca: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert certs(ca, "issue", "admin", "alice") == 0
    key, authority = (ca / "alice.key").read_bytes(), (ca / "ca.key").read_bytes()
    assert certs(ca, "issue", "viewer", "alice") == 81
    assert certs(ca, "init") == 81
    told = capfd.readouterr().err.splitlines()
    assert told[0].endswith("alice.pem: it is there already; `renew` renews it, --force overwrites")
    assert told[1].endswith("ca.key: it is there already; another CA needs another --dir")
    assert ((ca / "alice.key").read_bytes(), (ca / "ca.key").read_bytes()) == (key, authority)
    assert certs(ca, "issue", "viewer", "alice", "--force") == 0
    assert (ca / "alice.key").read_bytes() != key


def test_revoking_a_name_revokes_all_that_holds_of_it_and_nothing_else(ca: Path) -> None:
    for name in ("alice", "bob"):
        assert certs(ca, "issue", "admin", name) == 0
    (ca / "old.pem").write_bytes((ca / "alice.pem").read_bytes())
    assert certs(ca, "renew", "alice") == 0
    assert (ca / "old.pem").read_bytes() != (ca / "alice.pem").read_bytes()
    assert verified(ca, "old", "sslclient").endswith(": OK\n")
    assert certs(ca, "revoke", "alice") == 0
    assert "certificate revoked" in verified(ca, "old", "sslclient")
    assert "certificate revoked" in verified(ca, "alice", "sslclient")
    assert verified(ca, "bob", "sslclient").endswith(": OK\n")
    assert certs(ca, "revoke", "nobody") == 81


def test_renew_renews_what_is_due_and_the_list(ca: Path) -> None:
    with Authority.opened(ca) as authority:
        authority.issue("soon", Profile("soon", "admin"), days=1)
        authority.issue("later", Profile("later", "admin"), days=1)
    number = openssl("crl", "-in", ca / "crl.pem", "-noout", "-crlnumber")
    held = (ca / "soon.pem").read_bytes()
    assert certs(ca, "renew") == 0
    assert (ca / "soon.pem").read_bytes() == held, "it is young"
    assert openssl("crl", "-in", ca / "crl.pem", "-noout", "-crlnumber") != number
    assert certs(ca, "renew", "soon") == 0
    assert "subject=OU = admin, CN = soon" in openssl("x509", "-in", ca / "soon.pem", "-noout", "-subject")
    assert verified(ca, "soon", "sslclient").endswith(": OK\n")


def test_a_renewal_that_was_cut_short_is_finished(ca: Path) -> None:
    """A crash between the two renames: the certificate is new, its key is still beside it."""
    assert certs(ca, "issue", "admin", "alice") == 0
    (ca / "alice.key").rename(ca / "alice.key.next")
    with Authority.opened(ca):
        pass
    assert not (ca / "alice.key.next").exists()
    public = openssl("pkey", "-in", ca / "alice.key", "-pubout")
    assert public == openssl("x509", "-in", ca / "alice.pem", "-noout", "-pubkey")


def test_keys_under_a_passphrase(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ca, secret, wrong = tmp_path / "certs", tmp_path / "secret", tmp_path / "wrong"
    secret.write_text("correct horse\n")
    wrong.write_text("battery staple\n")
    assert certs(ca, "init", "--passphrase-file", str(secret)) == 0
    assert certs(ca, "issue", "admin", "alice") == 81
    assert certs(ca, "issue", "admin", "alice", "--passphrase-file", str(wrong)) == 81
    told = capfd.readouterr().err.splitlines()
    assert told[0].endswith("ca.key: it is encrypted; give --passphrase-file")
    assert told[1].endswith("ca.key: the passphrase is wrong, or it holds no private key")
    words = ("--passphrase-file", str(secret), "--key-passphrase-file", str(secret))
    assert certs(ca, "issue", "admin", "alice", *words) == 0
    assert "ENCRYPTED PRIVATE KEY" in (ca / "alice.key").read_text()
    assert "PUBLIC KEY" in openssl("pkey", "-in", ca / "alice.key", "-passin", f"file:{secret}", "-pubout")


def test_show_warns(ca: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert certs(ca, "issue", "server", "localhost") == 0
    assert certs(ca, "issue", "admin", "alice") == 0
    capfd.readouterr()
    assert certs(ca, "show") == 0
    assert "warning" not in capfd.readouterr().out
    bad = ca / "bad.pem"
    subject, files = "/OU=Admin/CN=x", ("-keyout", ca / "bad.key", "-out", bad)
    openssl("req", "-x509", "-newkey", "rsa:1024", "-nodes", "-sha1", "-days", "1", "-subj", subject, *files,
            "-addext", "basicConstraints=critical,CA:FALSE")  # fmt: skip
    (ca / "bad.key").chmod(0o644)
    assert run(["certs", "show", "--json", str(bad)]) == 0
    (found,) = json.loads(capfd.readouterr().out)
    assert [warning.partition(":")[0].replace(str(ca), "DIR") for warning in found["warnings"]] == [
        "its key is weak",
        "its signature is weak",
        "DIR/bad.key is open to others than its owner",
        "it does not say what it is for (extended key usage)",
        "its organizational unit (OU) is not exactly one of admin, viewer",
    ]
    certs(ca, "revoke", "alice")
    capfd.readouterr()
    assert certs(ca, "show") == 0
    assert "  warning: it is revoked" in capfd.readouterr().out.splitlines()


def request(directory: Path, *how: str) -> Path:
    """A signing request, made where the key stays; it asks for more than it gets."""
    new = how or ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    wishes = ("-subj", "/OU=admin/CN=mallory", "-addext", "basicConstraints=CA:TRUE")
    csr = directory / "own.csr"
    made = openssl("req", "-new", "-nodes", *new, *wishes, "-keyout", directory / "own.key", "-out", csr)
    assert csr.exists(), made
    return csr


def test_a_request_is_signed_for_its_key_alone_and_renewed_for_it(
    ca: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    csr = request(tmp_path)
    assert certs(ca, "issue", "viewer", "carol", "--csr", str(csr), "--days", "1") == 0
    assert capfd.readouterr().out.startswith(f"{ca}/carol.pem: until ")
    assert not (ca / "carol.key").exists()
    assert verified(ca, "carol", "sslclient").endswith(": OK\n")
    text = openssl("x509", "-in", ca / "carol.pem", "-noout", "-text")
    assert "Subject: OU = viewer, CN = carol" in text and "CA:FALSE" in text and "mallory" not in text
    public = openssl("pkey", "-in", tmp_path / "own.key", "-pubout")
    assert openssl("x509", "-in", ca / "carol.pem", "-noout", "-pubkey") == public
    old = (ca / "carol.pem").read_bytes()
    assert certs(ca, "renew", "carol") == 0
    assert (ca / "carol.pem").read_bytes() != old
    assert openssl("x509", "-in", ca / "carol.pem", "-noout", "-pubkey") == public
    assert certs(ca, "revoke", "carol") == 0
    assert "certificate revoked" in verified(ca, "carol", "sslclient")


def test_requests_that_are_none_or_weak_are_refused(ca: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weak = request(tmp_path, "-newkey", "rsa:1024")
    assert certs(ca, "issue", "admin", "x", "--csr", str(weak)) == 81
    forged = tmp_path / "forged.csr"
    good = bytearray(
        subprocess.run(["openssl", "req", "-in", request(tmp_path), "-outform", "DER"], capture_output=True, check=True).stdout
    )
    good[good.index(b"mallory")] ^= 1
    forged.write_bytes(good)
    assert certs(ca, "issue", "admin", "x", "--csr", str(forged)) == 81
    forged.write_text("nonsense")
    assert certs(ca, "issue", "admin", "x", "--csr", str(forged)) == 81
    assert certs(ca, "issue", "admin", "x", "--csr", str(tmp_path / "none")) == 81
    assert [
        line.removeprefix("jobrunner: cannot ").replace(str(tmp_path), "DIR") for line in capfd.readouterr().err.splitlines()
    ] == [
        "sign request: its key is weak; take ECDSA P-256",
        "sign request: its signature is wrong: who made it may not have the key",
        "sign request: it is no certificate signing request",
        "read request DIR/none: No such file or directory",
    ]
    assert not (ca / "x.pem").exists()


def test_a_key_under_a_passphrase_stays_so_and_the_others_are_renewed_all_the_same(
    ca: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("correct horse\n")
    assert certs(ca, "issue", "admin", "alice", "--key-passphrase-file", str(secret)) == 0
    assert certs(ca, "issue", "admin", "bob") == 0
    before = {name: (ca / name).read_bytes() for name in ("alice.pem", "alice.key", "bob.pem", "crl.pem")}
    capfd.readouterr()
    assert certs(ca, "renew", "alice", "bob") == 81
    assert "its key is encrypted, and so has to be the new one; give --key-passphrase-file" in capfd.readouterr().err
    assert {name for name, data in before.items() if (ca / name).read_bytes() != data} == {"bob.pem", "crl.pem"}
    assert certs(ca, "renew", "alice", "--key-passphrase-file", str(secret)) == 0
    assert "ENCRYPTED PRIVATE KEY" in (ca / "alice.key").read_text()


@pytest.mark.parametrize("name", ["ca", "crl", "../x", "", "a/b", "-x", "x" * 65])
def test_names_that_are_no_file_are_refused(ca: Path, name: str) -> None:
    with Authority.opened(ca) as authority, pytest.raises(CertificateError, match="is no name for a file"):
        authority.issue(name, Profile("x", "admin"))


def test_nothing_outlives_the_ca(ca: Path) -> None:
    with Authority.opened(ca) as authority, pytest.raises(CertificateError, match="the CA itself ends on"):
        authority.issue("x", Profile("x", "admin"), days=4000)
    assert not (ca / "x.pem").exists()


def test_help_loads_no_cryptography() -> None:
    code = "import sys\n"
    code += "from jobrunner_cli.main import run\nassert run(['certs', '--help']) == 0\nassert 'cryptography' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, stdout=subprocess.DEVNULL)


def pair_fits(ca: Path, name: str) -> bool:
    public = openssl("pkey", "-in", ca / f"{name}.key", "-pubout")
    return "PUBLIC KEY" in public and public == openssl("x509", "-in", ca / f"{name}.pem", "-noout", "-pubkey")


@pytest.mark.parametrize("calls", range(12))
def test_a_pair_fits_wherever_its_renewal_was_cut_short(ca: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """A crash before any of the steps on the directory; a key that is written is half there."""
    assert certs(ca, "issue", "admin", "alice") == 0
    left = calls

    class Crash(BaseException):
        pass

    def step(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def do(*words: Any, **how: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return real(*words, **how)

        return do

    with monkeypatch.context() as patched:
        for name in ("fsync", "replace", "fchmod"):
            patched.setattr(f"jobrunner.pki.store.os.{name}", step(name))
        with Authority.opened(ca) as authority, suppress(Crash):
            authority.renew("alice")
    (ca / "leftover.key.next").write_text("")
    with Authority.opened(ca):
        pass
    assert pair_fits(ca, "alice")
    assert list(ca.glob("*.next")) == []


def test_the_ca_is_not_renewed_as_if_it_were_a_client(ca: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (ca / "ca.key").read_bytes()
    assert certs(ca, "renew", "ca", "--days", "1") == 81
    assert certs(ca, "renew", "../certs/ca", "--days", "1") == 81
    assert 'cannot renew certificate: "ca" is no name for a file' in capfd.readouterr().err
    assert (ca / "ca.key").read_bytes() == before


def test_a_key_beside_its_request_is_kept_and_another_goes(ca: Path, tmp_path: Path) -> None:
    csr = request(tmp_path)
    own = (tmp_path / "own.key").read_bytes()
    (ca / "dora.key").write_bytes(own)
    assert certs(ca, "issue", "admin", "dora", "--csr", str(csr)) == 81
    assert certs(ca, "issue", "admin", "dora", "--csr", str(csr), "--force") == 0
    assert (ca / "dora.key").read_bytes() == own and pair_fits(ca, "dora")
    assert certs(ca, "issue", "admin", "dora", "--csr", str(request(tmp_path)), "--force") == 0
    assert not (ca / "dora.key").exists()


def test_a_key_that_is_revoked_or_a_stranger_s_is_not_certified_again(
    ca: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert certs(ca, "issue", "admin", "carol", "--csr", str(request(tmp_path))) == 0
    assert certs(ca, "revoke", "carol") == 0
    new = ("-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/OU=admin/CN=eve")
    openssl("req", *new, "-keyout", tmp_path / "eve.key", "-out", ca / "eve.pem")
    held = (ca / "carol.pem").read_bytes()
    assert certs(ca, "renew", "carol") == 81
    assert certs(ca, "renew", "eve") == 81
    assert (ca / "carol.pem").read_bytes() == held
    told = capfd.readouterr().err
    assert "cannot renew carol: its certificate is revoked" in told
    assert "cannot renew eve: its certificate was not issued here" in told


def test_a_request_that_does_not_end_is_not_read_to_its_end(ca: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert certs(ca, "issue", "admin", "x", "--csr", "/dev/zero") == 81
    assert capfd.readouterr().err == "jobrunner: cannot read request /dev/zero: it is longer than 65536 bytes\n"
