"""The real `jobrunner` as a process."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from jobrunner import JobInfo
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


class Running(subprocess.Popen[bytes]):
    """Does not outlive a test that fails while it runs."""

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *rest)


def popen(
    server: ServerProcess, *args: str, user: str = "admin", stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
) -> Running:
    """A running CLI. Close it, or use it as a context manager."""
    command = [str(Path(sys.executable).with_name("jobrunner")), *args]
    environ = server.environ(user)
    return Running(command, env=environ, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


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
    """The id of a job that runs a shell script; started by the SDK, which is quicker, unless there are options."""
    if options:
        return start(server, *options, "--", "sh", "-c", script)

    async def started() -> str:
        async with server.client() as client:
            return (await client.start("sh", "-c", script)).job_id

    return anyio.run(started)


def wait(server: ServerProcess, job_id: str) -> JobInfo:
    """How a job has ended, asked by the SDK."""

    async def waited() -> JobInfo:
        async with server.client() as client:
            return await client.get(job_id).wait()

    return anyio.run(waited)


def stop(server: ServerProcess, job_id: str) -> None:
    """End a job that the test has left running."""

    async def stopped() -> None:
        async with server.client() as client:
            await client.get(job_id).stop(grace=0)

    anyio.run(stopped)
