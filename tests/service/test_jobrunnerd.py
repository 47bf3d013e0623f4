"""`jobrunnerd` as a process: its lines, its signals, its exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import anyio.abc
import pytest

from jobrunner.client import ClientJob, JobClient
from jobrunner.config import RunnerConfig
from jobrunner.errors import JobRunnerError, PermissionDenied
from jobrunner.job import JobStatus
from jobrunner.pki import Authority, Profile
from jobrunner.runner import JobRunner
from jobrunner.server.devcerts import make_certs

pytestmark = pytest.mark.requires("root")

JOBRUNNERD = str(Path(sys.executable).parent / "jobrunnerd")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("JOBRUNNER")}


class Daemon:
    """A running jobrunnerd; `stderr` holds its lines so far."""

    def __init__(self, process: anyio.abc.Process) -> None:
        self.process = process
        self.stderr = ""

    async def line(self, part: str) -> str:
        """What follows this text on its line on stderr, as soon as it is there."""
        assert self.process.stderr is not None
        with anyio.fail_after(15):
            while not (found := re.search(rf"{re.escape(part)}(.*)\n", self.stderr)):
                self.stderr += (await self.process.stderr.receive()).decode()
        return found[1]

    async def exit_code(self) -> int:
        with anyio.fail_after(15):
            return await self.process.wait()


@asynccontextmanager
async def daemon(*args: str, env: Mapping[str, str] = ENVIRONMENT) -> AsyncIterator[Daemon]:
    async with await anyio.open_process([JOBRUNNERD, *args], stdin=subprocess.DEVNULL, env=env) as process:
        try:
            yield Daemon(process)
        finally:
            if process.returncode is None:
                process.kill()


def serve_args(path: Path) -> list[str]:
    if not (path / "ca.pem").exists():
        make_certs(path)
    names = {"ca": "ca.pem", "cert": "server.pem", "key": "server.key", "state-dir": "state"}
    return ["serve", "--listen", "127.0.0.1:0", *(f"--{name}={path / file}" for name, file in names.items())]


def client(path: Path, address: str, user: str = "admin") -> JobClient:
    return JobClient(address, ca=path / "ca.pem", cert=path / f"{user}.pem", key=path / f"{user}.key")


async def test_it_serves_until_sigterm_and_the_jobs_run_on(tmp_path: Path) -> None:
    async with daemon(*serve_args(tmp_path)) as server:
        async with client(tmp_path, await server.line("listening on ")) as admin:
            job = await admin.start("/bin/sleep", "60")
            server.process.send_signal(signal.SIGTERM)
        assert await server.exit_code() == 0
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        assert (await runner.get(job.job_id)).status is JobStatus.RUNNING
        await (await runner.get(job.job_id)).stop(grace=0)


async def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    async with daemon(*serve_args(tmp_path)) as server, client(tmp_path, await server.line("listening on ")) as admin:
        job = await admin.start("/bin/sh", "-c", "trap 'echo not yet' TERM; echo up; while :; do sleep 0.1; done")
        async with job.log() as output, anyio.create_task_group() as tasks:
            assert (await output.next_line()) is not None
            tasks.start_soon(_stop, job)  # holds the first stage up for its grace period
            assert (await output.next_line()) is not None
            server.process.send_signal(signal.SIGINT)
            await server.line("SIGINT: shutting down")
            server.process.send_signal(signal.SIGTERM)
            assert await server.exit_code() == 128 + signal.SIGTERM
            tasks.cancel_scope.cancel()
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        await (await runner.get(job.job_id)).stop(grace=0)


async def test_settings_come_from_variables_too(tmp_path: Path) -> None:
    serve_args(tmp_path)
    names = {"CA": "ca.pem", "CERT": "server.pem", "KEY": "server.key", "STATE_DIR": "state"}
    env = {f"JOBRUNNERD_{name}": str(tmp_path / file) for name, file in names.items()} | {"JOBRUNNERD_LISTEN": "127.0.0.1:0"}
    async with daemon("serve", env=ENVIRONMENT | env) as server:
        assert (await server.line("listening on ")).startswith("127.0.0.1:")


async def test_its_log_may_be_json_and_what_a_peer_says_is_no_line_of_it(tmp_path: Path) -> None:
    serving = serve_args(tmp_path)
    with Authority.opened(tmp_path) as authority:
        authority.issue("eve", Profile("eve\n{}", "viewer"), days=1)
    async with daemon(*serving, env=ENVIRONMENT | {"JOBRUNNERD_LOG_FORMAT": "json"}) as server:
        async with client(tmp_path, await server.line("listening on "), "eve") as viewer:
            with pytest.raises(PermissionDenied):
                await viewer.start("true")
        server.process.send_signal(signal.SIGTERM)
        await server.line("SIGTERM: shutting down")
        assert await server.exit_code() == 0
    told = [json.loads(line) for line in server.stderr.splitlines() if not line.startswith("listening on ")]
    denied, shutting = (next(line for line in told if word in line["message"]) for word in ("denied", "SIGTERM"))
    assert set(denied) == {"time", "level", "logger", "message"}
    assert (denied["level"], denied["logger"]) == ("warning", "jobrunner.server.auth")
    assert "'eve\\n{}'" in denied["message"]
    assert shutting["level"] == "info"


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"--ca": "/nosuch.pem"}, 2, "jobrunnerd: cannot read CA certificate /nosuch.pem: No such file or directory\n"),
        (
            {"--key": "{}/admin.key"},
            2,
            "jobrunnerd: cannot read key {}/admin.key: it does not belong to certificate {}/server.pem\n",
        ),
        ({"--listen": "nowhere"}, 2, "jobrunnerd: cannot read the command line: listen: 'nowhere' is no address such as "),
        ({"--listen": "192.0.2.1:1"}, 3, "jobrunnerd: cannot listen on 192.0.2.1:1: "),
        ({"--state-dir": "{}/ca.pem"}, 3, "jobrunnerd: cannot "),
    ],
)
def test_what_cannot_be_served_is_one_line_and_a_code(tmp_path: Path, change: dict[str, str], code: int, text: str) -> None:
    args = serve_args(tmp_path)
    for name, value in change.items():
        args += [name, value.replace("{}", str(tmp_path))]
    done = subprocess.run([JOBRUNNERD, *args], env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=False)
    *log, told = done.stderr.splitlines(keepends=True)  # what jobs lack on this host is told first, in the log
    assert (done.returncode, done.stdout) == (code, "")
    assert all(" what jobs lack here: " in line for line in log)
    assert told.startswith(text.replace("{}", str(tmp_path)))


async def test_a_state_directory_has_one_server(tmp_path: Path) -> None:
    args = serve_args(tmp_path)
    async with daemon(*args) as server:
        await server.line("listening on ")
        async with daemon(*args) as second:
            assert await second.exit_code() == 3


async def test_dev_prints_what_clients_need(tmp_path: Path) -> None:
    async with daemon("dev", "--dir", str(tmp_path / "d e v"), "--listen", "127.0.0.1:0") as server:
        await server.line("listening on ")
        assert server.process.stdout is not None
        printed = (await server.process.stdout.receive()).decode()
        lines = [line for line in printed.splitlines() if line.startswith("export ")]
        assert [(tmp_path / "d e v" / f"{user}.env").read_text() for user in ("admin", "viewer")] == [f"{line}\n" for line in lines]
        environments = [evaluated(line) for line in lines]
        async with JobClient.from_env(environments[0]) as admin, JobClient.from_env(environments[1]) as viewer:
            job = await admin.start("/bin/echo", "hi")
            assert (await viewer.get(job.job_id).wait()).user == "admin"
            with pytest.raises(PermissionDenied):
                await viewer.start("/bin/echo")


async def test_dev_under_sudo_gives_the_clients_keys_to_whom_it_was_called_by(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "SUDO_UID": "1000", "TMPDIR": str(tmp_path)}
    async with daemon("dev", "--listen", "127.0.0.1:0", env=environment) as server:
        await server.line("listening on ")
        (made,) = tmp_path.iterdir()
        modes = {path.name: (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) for path in (made, *made.glob("*.key"))}
    clients = {f"{user}.key": (1000, 0o600) for user in ("admin", "viewer")}
    assert modes == {made.name: (0, 0o711), "ca.key": (0, 0o600), "server.key": (0, 0o600), **clients}


@pytest.mark.parametrize("words", [[], ["dev", "-h"]])
async def test_help_is_shown_and_without_a_command_too(words: list[str]) -> None:
    done = await anyio.run_process([JOBRUNNERD, *words], check=False)
    assert done.returncode == (0 if words else 2)
    assert (done.stdout if words else done.stderr).startswith(b"Usage: jobrunnerd ")


def evaluated(line: str) -> dict[str, str]:
    """The environment after a shell has read this line."""
    shown = subprocess.run(["/bin/sh", "-c", f"{line}; env -0"], env={}, capture_output=True, check=True).stdout.decode()
    return dict(pair.split("=", 1) for pair in shown.split("\0") if pair)


async def _stop(job: ClientJob) -> None:
    with suppress(JobRunnerError):
        await job.stop()
