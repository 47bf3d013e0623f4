"""A real `jobrunnerd` process for tests, on a free port, with certificates and a state directory made for the test.

server          one for the whole session; tests share it, and each looks at its own jobs only
private_server  one for a test that stops it, or needs settings of its own
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from jobrunner.client import JobClient
from jobrunner.server.devcerts import make_certs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

READY = re.compile(rb"listening on (\S+:\d+)")
USERS = {"admin": "admin", "viewer": "viewer", "nobody": "operators"}
"""Users and their certificates' OU; the last is no role."""


class ServerProcess:
    """A running server. `address` is where it listens, `log` what it has written."""

    def __init__(
        self, directory: Path, *options: str, listen: str = "127.0.0.1:0", before: Sequence[str] = (), patience: float = 20
    ) -> None:
        """`before` is what the command begins with, if it is to be executed by something; in `patience` seconds it must be up."""
        self.certs = directory / "certs"
        self.state = directory / "state"
        self.stranger = directory / "stranger"
        if not self.certs.exists():
            make_certs(self.certs, USERS)
            make_certs(self.stranger, {"admin": "admin"})
        self.log = b""
        self._ready = threading.Event()
        files = (f"--ca={self.certs}/ca.pem", f"--cert={self.certs}/server.pem", f"--key={self.certs}/server.key")
        program = Path(sys.executable).with_name("jobrunnerd")
        command = [*before, str(program), "serve", f"--listen={listen}", f"--state-dir={self.state}", *files, *options]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(patience)
        found = READY.search(self.log)
        if found is None:
            self.end(signal.SIGKILL)
            raise RuntimeError(f"jobrunnerd did not come up:\n{self.log.decode(errors='replace')}")
        self.address = found[1].decode()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log += line
            if READY.search(line):
                self._ready.set()
        self._ready.set()

    def files(self, user: str = "admin") -> dict[str, Path]:
        """The certificate files of a user; `stranger` is an admin of another CA."""
        directory, name = (self.stranger, "admin") if user == "stranger" else (self.certs, user)
        return {"ca": self.certs / "ca.pem", "cert": directory / f"{name}.pem", "key": directory / f"{name}.key"}

    def client(self, user: str = "admin", timeout: float = 30.0) -> JobClient:
        files = self.files(user)
        return JobClient(self.address, ca=files["ca"], cert=files["cert"], key=files["key"], timeout=timeout)

    def environ(self, user: str = "admin") -> dict[str, str]:
        """The environment of a CLI process of this user."""
        names = {f"JOBRUNNER_{name.upper()}": str(path) for name, path in self.files(user).items()}
        return {**os.environ, "JOBRUNNER_ADDRESS": self.address, **names}

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait until it is gone; SIGKILL after 15 s. Returns its exit code."""
        self.process.send_signal(number)
        try:
            code = self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._reader.join(5)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


async def stop_all(server: ServerProcess) -> None:
    """End every job that runs."""
    async with server.client() as client:
        for info in await client.list(statuses=["running"]):
            await client.get(info.job_id).stop(grace=0)


@contextmanager
def server_process(directory: Path, *options: str, before: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """A server that is gone at the end, and its jobs with it: they outlive their server by design."""
    running = ServerProcess(directory, *options, before=before)
    try:
        yield running
        if running.process.poll() is None:
            anyio.run(stop_all, running)
    finally:
        if running.process.poll() is None:
            running.end()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def private_server(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path) as running:
        yield running
