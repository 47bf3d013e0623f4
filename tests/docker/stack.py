"""What the tests of the container do: compose, docker, and the host's own CLI, as a person would."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DEADLINE = 60.0
PUBLISHED = "127.0.0.1:7443"


@dataclass(frozen=True)
class Done:
    """A command that has ended. Output is text."""

    code: int
    out: str
    err: str


def run(command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT, check: bool = True) -> Done:
    """Run a command to its end; with `check`, AssertionError with what it said unless its exit code is 0."""
    done = subprocess.run(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert not check or done.returncode == 0, f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return Done(done.returncode, done.stdout, done.stderr)


class Stack:
    """docker-compose.yml, published on a free port of loopback."""

    def __init__(self) -> None:
        self.image = os.environ["JOBRUNNER_IMAGE"]
        self.docker_command = os.environ["JOBRUNNER_TEST_DOCKER"]
        self._compose = [*shlex.split(os.environ["JOBRUNNER_TEST_COMPOSE"]), "--file", str(ROOT / "docker-compose.yml")]
        self.address = free_address()
        self._env = {**os.environ, "JOBRUNNER_PUBLISH": self.address, "PATH": f"{BIN}:{os.environ['PATH']}"}

    def compose(self, *args: str, check: bool = True) -> Done:
        """`docker compose`."""
        return run([*self._compose, *args], self._env, check=check)

    def docker(self, *args: str, check: bool = True) -> Done:
        """`docker`."""
        return run([self.docker_command, *args], check=check)

    def wait_until_it_listens(self, container: str) -> None:
        """Until the server in a container that was started says so: sooner than its health check would."""
        follow = [self.docker_command, "logs", "--follow", "--since", self.inspect(container)["State"]["StartedAt"], container]
        with subprocess.Popen(follow, stderr=subprocess.PIPE, text=True) as logs:
            assert logs.stderr is not None
            said = []
            for line in logs.stderr:
                said.append(line)
                if line.startswith("listening on "):
                    logs.terminate()
                    return
        raise AssertionError(f"{container} has ended: {''.join(said)}")

    def inside(self, script: str) -> str:
        """What a shell command prints in the server's container."""
        return self.compose("exec", "-T", "jobrunnerd", "sh", "-c", script).out

    def container(self, service: str = "jobrunnerd") -> str:
        """The id of a service's container."""
        return self.compose("ps", "-q", service).out.strip()

    def inspect(self, container: str) -> Any:
        """What `docker inspect` says of a container."""
        return json.loads(self.docker("inspect", container).out)[0]

    @property
    def network(self) -> str:
        """The name of the stack's network."""
        (name,) = self.inspect(self.container())["NetworkSettings"]["Networks"]
        return str(name)

    def recipe(self, title: str, cwd: Path, changes: Mapping[str, str]) -> Done:
        """Run the shell commands below a heading of docs/container.md, in one shell, with `changes` made to them."""
        section = (ROOT / "docs/container.md").read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        script = "".join(re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE))
        assert script, title
        for text, other in {
            **changes,
            "docker compose": shlex.join(self._compose),
            "docker run": f"{self.docker_command} run",
        }.items():
            script = script.replace(text, other)
        script = re.sub(r"(?<= )jobrunner$", self.image, script, flags=re.MULTILINE)
        return run(["bash", "-euo", "pipefail", "-c", script], self._env, cwd)


class Cli:
    """`jobrunner` on the host, with the certificates of a directory."""

    def __init__(self, address: str, certs: Path, user: str = "admin") -> None:
        self.certs = certs
        files = {"CA": "ca.pem", "CERT": f"{user}.pem", "KEY": f"{user}.key"}
        self._env = {**os.environ, "JOBRUNNER_ADDRESS": address} | {
            f"JOBRUNNER_{name}": str(certs / file) for name, file in files.items()
        }

    def __call__(self, *args: str, check: bool = True) -> Done:
        return run([str(BIN / "jobrunner"), *args], self._env, check=check)

    def start(self, *args: str) -> str:
        """Start a job; its id."""
        return self("start", *args).out.removeprefix("Started job with ID: ").strip()

    def info(self, job_id: str) -> Any:
        """`jobrunner info --json`."""
        return json.loads(self("info", "--json", job_id).out)

    def follow(self, job_id: str) -> subprocess.Popen[str]:
        """`jobrunner log -f`, running."""
        command = [str(BIN / "jobrunner"), "log", "-f", job_id]
        return subprocess.Popen(command, env=self._env, stdout=subprocess.PIPE, text=True)


def free_address() -> str:
    """An address of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"
