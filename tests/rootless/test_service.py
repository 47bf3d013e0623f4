"""The whole way of an ordinary user: certificates, a server below his home, jobs over mutual TLS, a crash, and no trace."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rootless import GIVEN, MISSING
from tests.support.shim import all_pids, status_field, wait_until
from tests.support.timing import at_most

BIN = Path(sys.executable).parent
STARTED = re.compile(r"Started job with ID: ([0-9a-f]{12})\n")
CERTS = (("init",), ("issue", "server", "localhost", "--host", "127.0.0.1"), ("issue", "admin", "admin"))


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's home, with certificates in it."""
    directory = tmp_path_factory.mktemp("home")
    for words in CERTS:
        subprocess.run([BIN / "jobrunner", "certs", *words], cwd=directory, check=True, capture_output=True)
    return directory


@contextmanager
def served(where: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], Mapping[str, str], list[str]]]:
    """A server, what its clients' environment is, and what it said; it keeps its jobs below the home."""
    environ = {**os.environ, "HOME": str(where), "JOBRUNNERD_ALLOW_MISSING": " ".join(MISSING), **variables}
    files = [f"--ca={where}/certs/ca.pem", f"--cert={where}/certs/localhost.pem", f"--key={where}/certs/localhost.key"]
    command = [str(BIN / "jobrunnerd"), "serve", "--listen=127.0.0.1:0", *files]
    with subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            said: list[str] = []
            for line in server.stderr:
                said.append(line)
                if line.startswith("listening on "):
                    break
            address = said[-1].removeprefix("listening on ").strip()
            names = {"CA": "ca.pem", "CERT": "admin.pem", "KEY": "admin.key"}
            client = {f"JOBRUNNER_{name}": str(where / "certs" / file) for name, file in names.items()}
            yield server, {**os.environ, **client, "JOBRUNNER_ADDRESS": address}, said
        finally:
            server.terminate()
            assert server.stderr is not None
            server.stderr.read()


def cli(environ: Mapping[str, str], *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [BIN / "jobrunner", *words], env=environ, capture_output=True, text=True, timeout=at_most(30), check=False
    )
    assert done.returncode == code, done
    return done.stdout


def start(environ: Mapping[str, str], script: str) -> str:
    match = STARTED.fullmatch(cli(environ, "start", "--", "sh", "-c", script))
    assert match
    return match[1]


def shims() -> list[int]:
    """The user's."""
    mine = [pid for pid in all_pids() if status_field(pid, "Uid").startswith(f"{os.geteuid()}\t")]
    return [pid for pid in mine if status_field(pid, "Name").startswith("jobrunner-")]


@pytest.mark.given("cgroups")
def test_a_job_from_its_start_over_a_crash_to_its_end(where: Path) -> None:
    with served(where) as (server, environ, said):
        assert any("what jobs lack here: uid: " in line for line in said), said
        assert [line for line in said if ": not limited: " in line] == []
        assert cli(environ, "run", "--", "sh", "-c", "echo out; exit 7", code=7) == "out\n"
        ended = start(environ, "echo Hello World")
        assert cli(environ, "wait", ended) == "completed: exit code 0\n"
        assert cli(environ, "log", ended) == "Hello World\n"
        endless = start(environ, "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done")
        server.send_signal(signal.SIGKILL)
        server.wait()
    with served(where) as (_, environ, _):
        assert "running" in cli(environ, "status", endless)
        assert cli(environ, "log", ended) == "Hello World\n"
        cli(environ, "stop", endless)
        lines = cli(environ, "log", endless).split()
        assert lines == [str(number) for number in range(len(lines))]
        info = json.loads(cli(environ, "info", "--json", endless))
        assert any(text.startswith("uid: ") for text in info["missing"])
        for job in (ended, endless):
            cli(environ, "rm", job)
        (left,) = json.loads(cli(environ, "ls", "--json") or "[]") or [None]
        assert left is None or left["command"] == "sh"
    state = where / ".local/state/jobrunner"
    assert len(list((state / "jobs").iterdir())) == 1  # the one that was run
    wait_until(lambda: shims() == [])


@pytest.mark.given("nothing")
def test_a_server_to_try_it_with(tmp_path: Path) -> None:
    environ = {**os.environ, "JOBRUNNERD_ALLOW_MISSING": " ".join(MISSING)}
    command = [str(BIN / "jobrunnerd"), "dev", "--listen", "127.0.0.1:0", "--dir", str(tmp_path)]
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            assert any(line.startswith("listening on ") for line in server.stderr)
            as_admin = f". {tmp_path}/admin.env && exec {BIN}/jobrunner run -- whoami"
            assert subprocess.run(["sh", "-c", as_admin], check=True, capture_output=True).stdout == b"job\n"
        finally:
            server.terminate()
            server.stderr.read()


def check(environ: Mapping[str, str]) -> tuple[int, dict[str, dict[str, str]]]:
    done = subprocess.run(
        [BIN / "jobrunnerd", "check", "--json"],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=at_most(30),
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)}


def test_check_tells_what_a_user_has_and_what_it_lacks(tmp_path: Path) -> None:
    code, found = check({"HOME": str(tmp_path), "JOBRUNNERD_ALLOW_MISSING": " ".join(MISSING)})
    missing = {name for name, finding in found.items() if finding["level"] == "missing"}
    assert (code, missing) == (0, set())
    assert found["root"]["level"] == "limited"
    assert f"effective user id {os.geteuid()}" in found["root"]["what"]
    assert found["namespace user"]["level"] == found["fresh /proc"]["level"] == "ok"
    assert found["cgroup"]["level"] == ("ok" if GIVEN == "cgroups" else "limited")
    assert str(tmp_path / ".local/state/jobrunner") in found["state directory"]["what"]
    assert [name for name, finding in found.items() if (finding["level"] == "ok") == bool(finding["remedy"])] == []


@pytest.mark.given("nothing")
def test_a_server_refuses_in_the_words_of_the_check(where: Path, tmp_path: Path) -> None:
    code, found = check({"HOME": str(tmp_path)})
    assert (code, found["cgroup"]["level"]) == (3, "missing")
    for text in ("systemd-run --user --scope -p Delegate=yes", 'allow_missing = ["cpus", "memory", "read_bps", "write_bps"]'):
        assert text in found["cgroup"]["remedy"]
    with served(where, HOME=str(tmp_path), JOBRUNNERD_ALLOW_MISSING="") as (server, _, said):
        assert server.wait(at_most(20)) == 3
        assert "cannot run jobs: " in said[-1]
        assert found["cgroup"]["remedy"] in said[-1]
