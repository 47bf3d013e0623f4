"""Starting: what a job is given, and that nothing is left of one that could not be started."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from jobrunner import JobNotFound, JobSpec, Limits, StartFailed
from jobrunner.errors import HostError, InvalidRequest, LimitReached, RequestConflict
from jobrunner.linux.cgroup import JobCgroup
from jobrunner.record import JobRecord
from jobrunner.runner import RunnerJob
from tests.support.runner import cgroup_directories, open_runner, run, run_output, shell


async def test_a_job_runs_and_its_output_is_there(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info, data = await run_output(runner, JobSpec("echo", ("Hello World",)))
    assert data == b"Hello World\n"
    assert (info.status, info.end_reason, info.exit_code) == ("completed", "exited", 0)
    assert info.log_end == len(data)
    assert info.started is not None
    assert info.ended is not None
    assert info.created <= info.started <= info.ended


async def test_a_job_is_given_its_arguments_environment_and_directory_exactly(tmp_path: Path) -> None:
    spec = JobSpec(
        "sh", ("-c", 'printf "%s|" "$@" "$GREETING" "$PWD"', "sh", "", "a b", "ü\n*"), env={"GREETING": "hi"}, cwd="/usr"
    )
    async with open_runner(tmp_path) as runner:
        _, data = await run_output(runner, spec)
    assert data == "|a b|ü\n*|hi|/usr|".encode()


async def test_a_job_sees_none_of_the_servers_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_SECRET", "1")
    async with open_runner(tmp_path) as runner:
        _, data = await run_output(runner, JobSpec("env", env={"MINE": "2"}))
    names = {line.split("=")[0] for line in data.decode().splitlines()}
    assert names == {"PATH", "HOME", "USER", "LOGNAME", "LANG", "MINE"}


FAILURES = [
    (JobSpec("/no/such/command"), "exec", "No such file or directory"),
    (JobSpec("nosuchcommand"), "exec", "No such file or directory"),
    (JobSpec("/etc/passwd"), "exec", "Permission denied"),
    (JobSpec("/usr"), "exec", "Permission denied"),
    (JobSpec("true", cwd="/no/such/directory"), "cwd", "No such file or directory"),
    (JobSpec("true", cwd="/etc/passwd"), "cwd", "Not a directory"),
    (JobSpec("true", limits=Limits(open_files=1 << 40)), "rlimit", "Operation not permitted"),
]


@pytest.mark.parametrize(("spec", "step", "reason"), FAILURES)
async def test_a_start_that_fails_says_where_and_why_and_leaves_nothing(
    tmp_path: Path, spec: JobSpec, step: str, reason: str
) -> None:
    async with open_runner(tmp_path) as runner:
        await run(runner, JobSpec("true"))  # makes the base of the cgroup tree
        await runner.settled()
        before = _left(tmp_path)
        with pytest.raises(StartFailed) as caught:
            await runner.start(spec)
        assert caught.value.step == step
        assert reason in caught.value.message
        assert _left(tmp_path) == before
        assert len(await runner.list()) == 1


def _left(tmp_path: Path) -> tuple[list[str], list[str], int]:
    state = tmp_path / "state"
    base = next(path.name for path in Path("/sys/fs/cgroup").rglob("jobrunner-*") if path.is_dir())
    return sorted(map(str, state.rglob("*"))), sorted(cgroup_directories(base)), len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("user", JobSpec("true", user="x")),
        ("stdin", JobSpec("true", stdin=True)),
    ],
)
async def test_what_is_not_offered_is_refused_and_named(tmp_path: Path, field: str, spec: JobSpec) -> None:
    async with open_runner(tmp_path) as runner:
        with pytest.raises(InvalidRequest) as caught:
            await runner.start(spec)
    assert caught.value.field == field


async def test_a_limit_above_the_ceiling_is_refused(tmp_path: Path) -> None:
    async with open_runner(tmp_path, ceilings=Limits(memory=1 << 30)) as runner:
        with pytest.raises(InvalidRequest, match="limits.memory"):
            await runner.start(JobSpec("true", limits=Limits(memory=1 << 31)))


async def test_no_more_jobs_than_configured_run_at_once(tmp_path: Path) -> None:
    async with open_runner(tmp_path, max_running=2) as runner:
        jobs = [await runner.start(JobSpec("sleep", ("100",))) for _ in range(2)]
        with pytest.raises(LimitReached, match="max_running"):
            await runner.start(JobSpec("true"))
        await jobs[0].stop(grace=0)
        await run(runner, JobSpec("true"))


async def test_a_job_counts_once_in_the_moment_in_which_its_start_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_runner(tmp_path, max_running=2) as runner:
        adopt, second = runner.adopt, list[asyncio.Future[RunnerJob]]()

        def adopt_and_start(record: JobRecord, cgroup: JobCgroup, started: float) -> RunnerJob:
            second.extend([] if second else [asyncio.ensure_future(runner.start(JobSpec("sleep", ("100",))))])
            return adopt(record, cgroup, started)

        monkeypatch.setattr(runner, "adopt", adopt_and_start)
        await runner.start(JobSpec("sleep", ("100",)))
        await second[0]
        assert runner.running == 2


async def test_an_id_that_does_not_exist_is_not_found(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        with pytest.raises(JobNotFound):
            await runner.get("0123456789ab")


async def test_the_same_request_id_gives_the_same_job_and_another_request_under_it_is_refused(tmp_path: Path) -> None:
    spec = JobSpec("sleep", ("100",), request_id="r1")
    async with open_runner(tmp_path) as runner:
        first, second = await asyncio.gather(runner.start(spec, user="a"), runner.start(spec, user="a"))
        assert first is second
        with pytest.raises(RequestConflict):
            await runner.start(JobSpec("sleep", ("101",), request_id="r1"), user="a")
        assert (await runner.start(spec, user="b")) is not first


async def test_a_request_id_whose_start_failed_can_be_used_again(tmp_path: Path) -> None:
    program = tmp_path / "shown" / "program"
    program.parent.mkdir(mode=0o755)
    spec = JobSpec(str(program), request_id="r1")
    async with open_runner(tmp_path, show=(str(program.parent),)) as runner:
        with pytest.raises(StartFailed):
            await runner.start(spec)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert (await run(runner, spec)).status == "completed"


async def test_a_start_whose_caller_is_cancelled_goes_on(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        for delay in (0, 0.001, 0.003, 0.006):
            starting = asyncio.create_task(runner.start(shell("exec sleep 100")))
            await asyncio.sleep(delay)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
        await runner.settled()
        assert len(await runner.list()) >= 3  # a call that is cancelled before its first step has not begun
        assert {job.status for job in await runner.list()} == {"running"}


async def test_a_second_server_on_the_same_state_directory_is_refused(tmp_path: Path) -> None:
    async with open_runner(tmp_path):
        with pytest.raises(HostError, match="another server holds it"):
            async with open_runner(tmp_path):
                pass


async def test_64_starts_at_once_all_start(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        jobs = await asyncio.gather(*(runner.start(shell(f"echo {number}")) for number in range(64)))
        infos = await asyncio.gather(*(job.wait() for job in jobs))
    assert {info.status for info in infos} == {"completed"}
