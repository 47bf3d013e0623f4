"""A server that is killed: its jobs keep their times, a stop that was asked for is carried out, and a second server is refused."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

from jobrunner.config import RunnerConfig
from jobrunner.errors import HostError, InvalidRequest, StartFailed
from jobrunner.job import Limits, Stream
from jobrunner.output import Chunk
from jobrunner.runner import JobRunner
from jobrunner.shim.stopfile import StopRequest
from jobrunner.statedir import StateDir
from tests.support.daemon import ServerProcess
from tests.support.runner import cgroup_directories, open_runner, shell, shims_below, shims_gone
from tests.support.timing import at_most, fail_after

pytestmark = pytest.mark.requires("root")

ESCALATION = "trap 'echo asked' TERM; echo up; while :; do sleep 0.05; done"


async def test_times_hold_while_no_server_runs_and_are_told_as_the_reason(private_server: ServerProcess, tmp_path: Path) -> None:
    async with private_server.client() as client:
        deadline = await client.start("sleep", "100", limits=Limits(timeout=1.5))
        idle = await client.start("sh", "-c", "echo up; exec sleep 100", limits=Limits(idle_timeout=1.5))
        flood = "sleep 1.2; head -c 1000000 /dev/zero; exec sleep 100"
        limit = await client.start("sh", "-c", flood, limits=Limits(output_limit=65536, output_policy="stop"))  # type: ignore[arg-type]
        stopped = await client.start("sh", "-c", ESCALATION, grace=1.5)
        async with stopped.log() as output:
            await anext(output)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stopped.stop)
                assert (await output.next_line()) is not None
                private_server.end(signal.SIGKILL)
                tasks.cancel_scope.cancel()
    await shims_gone(tmp_path)
    async with open_runner(tmp_path) as runner:
        infos, late = {}, {}
        for name, job in {"deadline": deadline, "idle_timeout": idle, "output_limit": limit, "stopped": stopped}.items():
            with fail_after(10):
                infos[name] = await (await runner.get(job.job_id)).wait()
                late[name] = (infos[name].usage.wall or 0) - 1.5
        async with (await runner.get(limit.job_id)).log() as reader:
            late["output_limit"] = (infos["output_limit"].ended or 0) - (await anext(reader)).time  # type: ignore[union-attr]
    print("late by ms:", {name: round(seconds * 1000, 1) for name, seconds in late.items()})
    assert {name: str(info.end_reason) for name, info in infos.items()} == {name: name for name in infos}
    assert infos["stopped"].stopped_by == "admin"
    assert {name: 0 <= seconds < at_most(5) for name, seconds in late.items()} == dict.fromkeys(late, True), late


async def test_a_job_that_writes_and_ends_while_no_server_runs_is_held_up_by_nothing(
    private_server: ServerProcess, tmp_path: Path
) -> None:
    """Far more than any pipe holds; each byte is there, at its offset."""
    script = "read _ </work/go; head -c 20000000 /dev/urandom | tee /dev/stderr | sha256sum; exit 9"
    async with private_server.client() as client:
        job = await client.start("sh", "-c", f"mkfifo /work/go; echo up; {script}")
        async with job.log() as output:
            await anext(output)
    private_server.end(signal.SIGKILL)
    (tmp_path / "state" / "jobs" / job.job_id / "work" / "go").write_text("go\n")
    await shims_gone(tmp_path, 30)
    async with open_runner(tmp_path) as runner:
        again = await runner.get(job.job_id)
        assert (await again.wait()).exit_code == 9
        digest, said, at = hashlib.sha256(), b"", 0
        async with again.log() as reader:
            async for part in reader:
                assert isinstance(part, Chunk) and part.offset == at
                at = part.next_offset
                if part.stream is Stream.STDERR:
                    digest.update(part.data)
                else:
                    said += part.data
    assert said.split() == [b"up", digest.hexdigest().encode(), b"-"]


async def test_a_stop_that_was_written_right_before_a_crash_is_carried_out_after_it(tmp_path: Path) -> None:
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        job = await runner.start(shell("sleep 100"))
        # What a server leaves that dies between the durable file and the line on ctl.
        runner.state.write_stop(job.job_id, StopRequest(reason="stopped", signal=15, grace=5, by="alice"))
        torn = await runner.start(shell("sleep 100"))
        (runner.state.directory(torn.job_id) / "stop").write_bytes(b"jobrunner-stop=9\0")
    async with open_runner(tmp_path) as runner:
        with fail_after(10):
            info = await (await runner.get(job.job_id)).wait()
            assert (await (await runner.get(torn.job_id)).wait()).end_reason == "stopped"
    assert (info.end_reason, info.stopped_by) == ("stopped", "alice")


async def test_shims_that_are_killed_while_no_server_runs_are_told_as_lost_and_leave_nothing(tmp_path: Path) -> None:
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        job = await runner.start(shell("sleep 100"))
    directory = tmp_path / "state" / "jobs" / job.job_id
    state = await anyio.to_thread.run_sync(shims_below, directory)
    assert len(state) == 1
    os.kill(state[0], signal.SIGKILL)
    async with open_runner(tmp_path) as runner:
        with fail_after(10):
            assert (await (await runner.get(job.job_id)).wait()).end_reason == "lost"
    assert cgroup_directories(job.job_id) == []
    assert shims_below(directory) == []


async def test_a_server_that_can_open_no_file_tells_no_end_that_it_could_not_read(private_server: ServerProcess) -> None:
    pid = private_server.process.pid
    async with private_server.client() as client:
        job = await client.start("sh", "-c", "mkfifo go; read _ <go; exit 3")
        go = private_server.state / "jobs" / job.job_id / "work" / "go"
        with fail_after(10):
            while not go.exists():  # noqa: ASYNC110 - a job tells nobody what it makes
                await anyio.sleep(0.01)
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            await anyio.to_thread.run_sync(go.write_text, "go\n")
            with fail_after(10):
                while f"cannot read how job {job.job_id} ended".encode() not in private_server.log:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            with pytest.raises(HostError, match=f"cannot read log of job {job.job_id}: Too many open files"):
                await job.info()
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        with fail_after(10):
            info = await job.wait()
    assert (info.end_reason, info.exit_code) == ("exited", 3)


def test_a_second_server_is_refused_until_the_first_is_killed(private_server: ServerProcess, tmp_path: Path) -> None:
    arguments = [f"--{name}={path}" for name, path in (("ca", "ca.pem"), ("cert", "server.pem"), ("key", "server.key"))]
    command = [
        str(Path(sys.executable).with_name("jobrunnerd")),
        "serve",
        "--listen=127.0.0.1:0",
        f"--state-dir={private_server.state}",
    ]
    done = subprocess.run([*command, *arguments], cwd=private_server.certs, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (
        3,
        f"jobrunnerd: cannot use state directory {private_server.state}: another server holds it\n",
    )
    private_server.end(signal.SIGKILL)
    begun = time.monotonic()
    StateDir(private_server.state).close()
    assert time.monotonic() - begun < at_most(5)


async def test_a_workspace_is_its_jobs_also_when_the_server_is_killed_between_giving_and_taking_it(tmp_path: Path) -> None:
    settings = tmp_path / "jobrunnerd.toml"
    settings.write_text("workspaces = true\n")
    first = ServerProcess(tmp_path, f"--config={settings}")
    async with first.client() as client:
        held = await client.start("sh", "-c", "echo mine > file; echo up; exec sleep 100", workspace="held")
        async with held.log() as output:
            await output.next_line()
            first.end(signal.SIGKILL)
    second = ServerProcess(tmp_path, f"--config={settings}")
    try:
        async with second.client() as client:
            with pytest.raises(StartFailed, match=f"held is in use by job {held.job_id}"):
                await client.start("true", workspace="held")
            with pytest.raises(InvalidRequest, match=f"in use by job {held.job_id}"):
                await client.remove_workspace("held")
            await client.get(held.job_id).stop(grace=0)
            assert (await (await client.start("grep", "mine", "file", workspace="held")).wait()).exit_code == 0
            await client.remove_workspace("held")
            assert await client.workspaces() == []
    finally:
        second.end()
