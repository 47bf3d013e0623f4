"""Directories that are kept from one job of a user to the next, and that one job has at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import anyio
import pytest

from jobrunner import JobSpec
from jobrunner.config import RunnerConfig
from jobrunner.errors import InvalidRequest, LimitReached, StartFailed
from jobrunner.runner import JobRunner
from tests.support.runner import open_runner, output, run_output, shell
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

C = '#include <stdio.h>\nint main(void) { puts("built"); return 0; }\n'


async def run_as(runner: JobRunner, user: str, script: str) -> bytes:
    with fail_after(20):
        job = await runner.start(shell(script, workspace="build"), user=user)
        data = await output(job)
        await job.wait()
    return data


async def test_what_one_job_leaves_the_next_one_finds_and_owns(tmp_path: Path) -> None:
    async with open_runner(tmp_path, workspaces=True) as runner:
        first = await run_as(runner, "ann", f"pwd; id -u; cat > hello.c <<'END'\n{C}END\ncc -o hello hello.c")
        second = await run_as(runner, "ann", "id -u; stat -c %U hello; ./hello; echo more >> hello.c")
    where, uid = first.decode().split()
    own, name, built = second.decode().split()
    assert (where, name, built) == ("/workspace", "job", "built")
    assert uid != own


async def test_another_users_workspace_of_the_same_name_is_another(tmp_path: Path) -> None:
    async with open_runner(tmp_path, workspaces=True) as runner:
        await run_as(runner, "ann", "echo anns > file")
        assert await run_as(runner, "..", "ls -A") == b""
        found = await runner.list_workspaces()
    assert [(one.user, one.name) for one in found] == [("..", "build"), ("ann", "build")]


async def test_one_job_has_it_at_a_time_also_after_a_restart(tmp_path: Path) -> None:
    spec = shell("exec sleep 100", workspace="build")
    async with JobRunner.open(config(tmp_path)) as runner:
        job_id = (await runner.start(spec, user="ann")).job_id
        with pytest.raises(StartFailed, match=f"workspace: build is in use by job {job_id}"):
            await runner.start(spec, user="ann")
        assert runner.running == 1
    async with open_runner(tmp_path, workspaces=True) as runner:
        with pytest.raises(StartFailed, match=f"in use by job {job_id}"):
            await runner.start(spec, user="ann")
        with pytest.raises(InvalidRequest, match=f"cannot remove workspace: name: build is in use by job {job_id}"):
            await runner.remove_workspace("ann", "build")
        assert [(one.held_by, one.size) for one in await runner.list_workspaces()] == [(job_id, None)]
        await (await runner.get(job_id)).stop(grace=0)
        assert await run_as(runner, "ann", "echo free") == b"free\n"


async def test_of_many_that_ask_at_once_one_gets_it(tmp_path: Path) -> None:
    spec = shell("exec sleep 100", workspace="build")
    async with open_runner(tmp_path, workspaces=True) as runner:
        results = await asyncio.gather(*(runner.start(spec, user="ann") for _ in range(8)), return_exceptions=True)
        assert sum(isinstance(result, StartFailed) for result in results) == 7
        assert runner.running == 1


async def test_a_start_that_fails_lets_go_of_it(tmp_path: Path) -> None:
    async with open_runner(tmp_path, workspaces=True) as runner:
        with pytest.raises(StartFailed) as caught:
            await runner.start(JobSpec("nosuch", workspace="build"), user="ann")
        assert caught.value.step == "exec"
        assert await run_as(runner, "ann", "echo free") == b"free\n"


async def test_a_workspace_tells_its_size_and_last_use_and_can_be_removed(tmp_path: Path) -> None:
    async with open_runner(tmp_path, workspaces=True) as runner:
        job = await runner.start(shell("head -c 1M /dev/urandom > file; ln -s /etc link", workspace="build"), user="ann")
        info = await job.wait()
        (one,) = await runner.list_workspaces()
        assert (info.workspace, one.held_by) == ("build", "")
        assert one.size is not None and 1 << 20 <= one.size < 2 << 20
        assert info.created <= one.used + 1 and one.used <= (info.ended or 0)
        await runner.remove_workspace("ann", "build")
        assert await runner.list_workspaces() == []
        assert await anyio.Path("/etc/passwd").exists()
        with pytest.raises(InvalidRequest, match="'build' is no workspace of this user"):
            await runner.remove_workspace("ann", "build")
    assert list((tmp_path / "state" / "workspaces" / "ann").iterdir()) == []


async def test_a_user_has_a_bounded_number_of_them_also_of_those_made_at_once(tmp_path: Path) -> None:
    async with open_runner(tmp_path, workspaces=True, workspaces_per_user=2) as runner:
        specs = [JobSpec("true", workspace=f"w{number}") for number in range(6)]
        results = await asyncio.gather(*(runner.start(spec, user="ann") for spec in specs), return_exceptions=True)
        refused = [result for result in results if isinstance(result, LimitReached)]
        assert [one.bound for one in refused] == ["workspaces_per_user"] * 4
        assert 'user "ann" has 2 workspaces; remove one' in refused[0].message
        await runner.drain()
        made = sorted(one.name for one in await runner.list_workspaces())
        assert len(made) == 2
    async with open_runner(tmp_path, workspaces=True, workspaces_per_user=2) as runner:
        await (await runner.start(JobSpec("true", workspace=made[0]), user="ann")).wait()
        await (await runner.start(JobSpec("true", workspace="w9"), user="bob")).wait()
        await runner.remove_workspace("ann", made[1])
        await (await runner.start(JobSpec("true", workspace="w9"), user="ann")).wait()


@pytest.mark.parametrize("name", ["..", "../ann/build", "", "a/b", "\0"])
async def test_a_name_that_leads_elsewhere_is_no_workspace(tmp_path: Path, name: str) -> None:
    async with open_runner(tmp_path, workspaces=True) as runner:
        await run_as(runner, "ann", "true")
        with pytest.raises(InvalidRequest, match="is no workspace"):
            await runner.remove_workspace("ann", name)
        assert len(await runner.list_workspaces()) == 1


async def test_a_server_that_keeps_none_says_so(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        with pytest.raises(InvalidRequest, match="workspaces = true"):
            await runner.start(JobSpec("true", workspace="build"))


async def test_a_job_reaches_no_workspace_but_its_own(tmp_path: Path) -> None:
    async with open_runner(tmp_path, workspaces=True) as runner:
        await run_as(runner, "ann", "echo secret > file")
        _, data = await run_output(runner, shell(f"ls /workspace {tmp_path} 2>/dev/null; cat /workspace/../*/file"))
    assert b"secret" not in data


def config(tmp_path: Path) -> RunnerConfig:
    return RunnerConfig(state_dir=tmp_path / "state", workspaces=True)
