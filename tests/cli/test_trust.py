"""Certificates from their making to their revocation, by the commands alone: server and client with keys under passphrases."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest

from jobrunner_cli.main import run
from tests.support.cli import jobrunner
from tests.support.daemon import server_process
from tests.support.server import eventually
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root")


def certs(directory: Path, *words: str) -> None:
    assert run(["certs", *words, "--dir", str(directory)]) == 0


def test_from_the_first_certificate_to_its_revocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ca, secret, wrong, log = tmp_path / "certs", tmp_path / "secret", tmp_path / "wrong", tmp_path / "audit.jsonl"
    secret.write_text("correct horse\n")
    wrong.write_text("battery staple\n")
    opened, locked = ("--passphrase-file", str(secret)), ("--key-passphrase-file", str(secret))
    certs(ca, "init", *opened)
    certs(ca, "issue", "server", "server", "--host", "localhost", "--host", "127.0.0.1", *opened, *locked)
    certs(ca, "issue", "admin", "admin", *opened)
    certs(ca, "issue", "viewer", "carol", *opened, *locked)
    monkeypatch.setenv("JOBRUNNERD_AUDIT_LOG", str(log))
    with server_process(tmp_path, f"--key-passphrase-file={secret}", f"--crl={ca}/crl.pem") as server:
        address = server.address.replace("127.0.0.1", "localhost")
        assert jobrunner(server, *locked, "ls", user="carol").code == 0
        assert jobrunner(server, "--address", address, *locked, "ls", user="carol").code == 0
        said = jobrunner(server, "ls", user="carol")
        assert (said.code, said.err) == (
            78,
            f"jobrunner: cannot read key {ca}/carol.key: it is encrypted, and no passphrase file is given\n",
        )
        said = jobrunner(server, "--key-passphrase-file", str(wrong), "ls", user="carol")
        assert (said.code, said.err) == (
            78,
            f"jobrunner: cannot read key {ca}/carol.key: the passphrase in {wrong} does not open it\n",
        )
        said = jobrunner(server, *locked, "start", "true", user="carol")
        assert (said.code, said.err) == (77, "jobrunner: cannot call Start: the role viewer does not allow it\n")
        said = jobrunner(server, "ls", user="server")
        assert said.code == 78, "its key is under a passphrase, too"
        said = jobrunner(server, *locked, "ls", user="server")
        assert said.code == 67
        assert said.err.endswith(
            "the server rejected the client certificate: it is not for use by a client (extended key usage clientAuth)\n"
        )
        certs(ca, "revoke", "carol", *opened)

        def is_refused() -> bool:
            said = jobrunner(server, *locked, "ls", user="carol")
            return said.code == 67 and said.err.endswith("the server rejected the client certificate: it is revoked\n")

        anyio.run(eventually, is_refused, at_most(20))
    reasons = [line["reason"] for line in map(json.loads, log.read_text().splitlines()) if "reason" in line]
    assert {"cannot call Start: the role viewer does not allow it", "unsuitable certificate purpose", "certificate revoked"} <= {
        *reasons
    }
