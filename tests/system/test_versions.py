"""Shims, records and logs of servers of an older version, really built, under this one; and of a newer one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

import jobrunner.shim
from jobrunner import JobSpec, Limits, launcher
from jobrunner.client import ClientJob
from jobrunner.config import RunnerConfig
from jobrunner.errors import RequestConflict
from jobrunner.runner import JobRunner
from jobrunner.shim import exitrecord
from tests.support.crash import assert_exactly, state_of
from tests.support.daemon import ServerProcess
from tests.support.runner import open_runner, output, processes_with, shell
from tests.support.timing import fail_after

ROOT = Path(__file__).parents[2]
OLDER = {"jobs of root": "b0c5c16f6e42", "one uid for each job": "54b9681a63d4"}
"""Versions before this one, by what was other about them."""
pytestmark = [pytest.mark.requires("root", "command:git", "command:cc"), pytest.mark.timeout(120)]

TICKS = "echo up; i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo line $i; sleep 0.02; done; exit 7"
ENDED = b"up\n" + b"".join(b"line %d\n" % number for number in range(1, 61))
ONCE = JobSpec("sh", ("-c", "echo out; echo err >&2; exit 3"), request_id="r")
DEAF = "trap 'echo asked' TERM; echo up; while :; do sleep 0.05; done"
POLITE = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done"


def built(path: Path, revision: str) -> Path:
    """The package as it was then, its shim compiled."""
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", revision, "jobrunner", "hatch_build.py"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", path], input=archive.stdout, check=True)
    subprocess.run([sys.executable, path / "hatch_build.py"], check=True)
    return path


@pytest.mark.requires(*(f"history:{revision}" for revision in OLDER.values()))
@pytest.mark.parametrize("older", OLDER)
async def test_an_older_servers_jobs_are_read_adopted_stopped_and_settled(tmp_path: Path, older: str) -> None:
    package = tmp_path / "older"
    package.mkdir()
    await anyio.to_thread.run_sync(built, package, OLDER[older])
    server = await anyio.to_thread.run_sync(lambda: ServerProcess(tmp_path, before=("env", f"PYTHONPATH={package}")))
    jobs: dict[str, ClientJob] = {}
    async with server.client() as client:
        jobs["ended"] = await client.start(ONCE)
        await jobs["ended"].wait()
        jobs["ends"] = await client.start("sh", "-c", TICKS)
        jobs["runs"] = await client.start("sh", "-c", POLITE)
        jobs["deadline"] = await client.start("sh", "-c", DEAF, limits=Limits(timeout=2), grace=0.2)
        jobs["asked"] = await client.start("sh", "-c", DEAF, grace=2.0)
        for job in jobs.values():
            async with job.log() as reader:
                assert await reader.next_line()
        async with jobs["asked"].log() as reader, anyio.create_task_group() as tasks:
            tasks.start_soon(jobs["asked"].stop)
            while (line := await reader.next_line()) is not None and line.data != b"asked\n":
                pass
            server.end(signal.SIGKILL)
            tasks.cancel_scope.cancel()
    assert not (server.state / "leaving").exists(), "this was no older server"
    server = await anyio.to_thread.run_sync(ServerProcess, tmp_path)
    try:
        with fail_after(40):
            async with server.client() as client:
                again = {name: client.get(job.job_id) for name, job in jobs.items()}
                assert (await again["runs"].info()).end_reason is None
                if older == "jobs of root":  # a fingerprint was of all fields then, also those that have come since
                    with pytest.raises(RequestConflict):
                        await client.start(ONCE)
                else:
                    assert (await client.start(ONCE)).job_id == jobs["ended"].job_id
                infos = {name: await (job.stop() if name == "runs" else job.wait()) for name, job in again.items()}
                told = {name: (str(info.end_reason), info.exit_code, info.stopped_by) for name, info in infos.items()}
                assert told == {
                    "ended": ("exited", 3, ""),
                    "ends": ("exited", 7, ""),
                    "runs": ("stopped", 5, "admin"),
                    "deadline": ("deadline", None, ""),
                    "asked": ("stopped", None, "admin"),
                }
                async with again["ends"].log() as reader:
                    assert b"".join([part.data async for part in reader if hasattr(part, "data")]) == ENDED
        await anyio.to_thread.run_sync(assert_exactly, server.state, [], [job.job_id for job in jobs.values()])
    finally:
        await anyio.to_thread.run_sync(server.end)


def newer_shim(path: Path) -> Path:
    """This shim, whose exit records are of the next version."""
    copy = path / "newer" / "jobrunner" / "shim"
    shutil.copytree(Path(jobrunner.shim.__file__).parent, copy)
    shutil.copy(ROOT / "hatch_build.py", path / "newer")
    source = copy / "exit.c"
    text = source.read_text()
    assert text.count("record->version = 1;") == 1
    source.write_text(text.replace("record->version = 1;", "record->version = 2;"))
    subprocess.run([sys.executable, path / "newer" / "hatch_build.py"], check=True)
    return copy / "jobrunner-shim"


async def test_a_newer_versions_job_is_left_alone_while_it_runs_and_set_aside_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    helper = await anyio.to_thread.run_sync(newer_shim, tmp_path)
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
        with monkeypatch.context() as patched:
            patched.setattr(launcher, "binary_path", lambda: helper)
            job = await runner.start(shell("echo up; while [ ! -e /work/go ]; do sleep 0.02; done; exit 7"))
    work = runner.state.directory(job.job_id) / "work"
    async with open_runner(tmp_path) as runner:
        assert await runner.list() == []
        assert f"jobs/{job.job_id}: exit: its version is newer than this server knows; left alone, for it runs" in caplog.text
    assert state_of(tmp_path / "state")["shims"] == [job.job_id]
    with monkeypatch.context() as patched:  # the newer server
        patched.setattr(exitrecord, "VERSION", 2)
        async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state")) as runner:
            assert (await runner.get(job.job_id)).status == "running"
    (work / "go").touch()
    with fail_after(10):
        while state_of(tmp_path / "state")["shims"]:  # noqa: ASYNC110 - no server, so nobody tells
            await anyio.sleep(0.02)
    async with open_runner(tmp_path) as runner:
        assert await runner.list() == []
        assert (await (await runner.start(JobSpec("true"))).wait()).exit_code == 0
    aside = tmp_path / "state" / "corrupt" / job.job_id
    assert "exit: its version is newer" in aside.with_name(f"{job.job_id}.why").read_text()
    aside.rename(tmp_path / "state" / "jobs" / job.job_id)
    with monkeypatch.context() as patched:
        patched.setattr(exitrecord, "VERSION", 2)
        async with open_runner(tmp_path) as runner:
            again = await runner.get(job.job_id)
            assert (again.info().exit_code, await output(again)) == (7, b"up\n")
    assert processes_with(job.job_id) == []
