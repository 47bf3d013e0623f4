"""The real `jobrunner` as a process."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.daemon import ServerProcess

STARTED = re.compile(r"Started job with ID: ([0-9a-f]{12})\n")


@dataclass(frozen=True)
class Result:
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()


def popen(server: ServerProcess, *args: str, user: str = "admin", stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    """A running CLI. Close it, or use it as a context manager."""
    command = [str(Path(sys.executable).with_name("jobrunner")), *args]
    environ = server.environ(user)
    return subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE)


def jobrunner(server: ServerProcess, *args: str, user: str = "admin", timeout: float = 40) -> Result:
    """A CLI that has ended."""
    with popen(server, *args, user=user) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return Result(process.returncode, out, err.decode())


def start(server: ServerProcess, *args: str) -> str:
    """The id of a job that the CLI has started."""
    result = jobrunner(server, "start", *args)
    match = STARTED.fullmatch(result.text)
    assert match, result
    return match[1]


def shell(server: ServerProcess, script: str, *options: str) -> str:
    """The id of a job that runs a shell script."""
    return start(server, *options, "--", "sh", "-c", script)
