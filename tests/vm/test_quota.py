"""Directories that project quotas bound: in the virtual machine (run.sh), whose kernel has them, on ext4 and xfs."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import pytest

from jobrunner import JobSpec, Limits
from jobrunner.config import RunnerConfig
from jobrunner.errors import LimitReached, StartFailed
from jobrunner.linux.quota import Projects
from jobrunner.offers import Offers, Volume
from jobrunner.runner import JobRunner
from tests.hostile.arena import SMALL, open_arena, outside
from tests.support.quota import records, until_left
from tests.support.runner import open_runner, output, run, run_output, shell
from tests.support.timing import fail_after

MIB = 1 << 20
OWNER = 0x6FFF0001
SIZE = 8 * MIB
FEWEST_FILES = 1024
NAMES = "python3 -c 'for number in range(2000): open(str(number), \"w\").close()' 2>&1 | tail -1; ls | wc -l"


@dataclass(frozen=True)
class Disk:
    path: Path
    full: int
    """What a job hears that has used up its quota."""

    @property
    def told(self) -> bytes:
        return {errno.EDQUOT: b"Disk quota exceeded", errno.ENOSPC: b"No space left on device"}[self.full]


BOTH = pytest.mark.parametrize("disk", ["ext4", "xfs"], indirect=True)


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A disk that is made of a file, mounted with project quotas: ext4, unless the test says so."""
    kind = getattr(request, "param", "ext4")
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    if kind == "ext4":
        subprocess.run(["truncate", "--size=128M", image], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "quota,project", "-E", "quotatype=prjquota", image], check=True)
    else:
        subprocess.run(["truncate", "--size=320M", image], check=True)
        subprocess.run(["mkfs.xfs", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop,prjquota", image, mount], check=True)
    yield Disk(mount, errno.EDQUOT if kind == "ext4" else errno.ENOSPC)
    subprocess.run(["umount", "--lazy", mount], check=True)


def fill(mib: int, file: str = "big") -> str:
    return f"exec 2>&1; head -c {mib}M /dev/zero > {file}; stat -c %s {file}; "


def sized(size: int = SIZE) -> Limits:
    return Limits(work_size=size)


@BOTH
async def test_work_is_on_disk_and_has_its_size(disk: Disk) -> None:
    async with open_runner(disk.path) as runner:
        script = fill(20) + "df --output=size --block-size=1 . | tail -1"
        info, data = await run_output(runner, shell(script, limits=sized()))
        (found,) = records(disk.path).values()
        larger, all_of_it = await run_output(runner, shell(fill(20), limits=sized(32 * MIB)))
        for job in (info, larger):
            await runner.remove(job.job_id)
    *_, written, size = data.splitlines()
    assert disk.told in data
    assert SIZE - 256 * 1024 <= int(written) <= SIZE
    assert abs(int(size) - SIZE) <= 64 * 1024
    assert (info.work, info.limits.work_size) == ("disk", SIZE)
    assert (found.most_bytes, found.most_files) == (SIZE, FEWEST_FILES) and found.used_bytes <= SIZE
    assert int(all_of_it) == 20 * MIB


@BOTH
async def test_files_are_bounded_too(disk: Disk) -> None:
    async with open_runner(disk.path) as runner:
        info, data = await run_output(runner, shell(NAMES, limits=sized()))
        larger, all_of_them = await run_output(runner, shell(NAMES, limits=sized(64 * MIB)))
        for job in (info, larger):
            await runner.remove(job.job_id)
    assert disk.told in data and int(data.splitlines()[-1]) == FEWEST_FILES - 1  # and the directory itself
    assert int(all_of_them.splitlines()[-1]) == 2000


async def test_a_full_work_directory_is_its_jobs_alone(disk: Disk, tmp_path: Path) -> None:
    async with open_runner(disk.path) as runner:
        full = await runner.start(shell(fill(20) + "exec sleep 600", limits=sized()))
        async with full.log() as reader:
            line = await reader.next_line()
        assert line is not None and disk.told in line.data
        info, data = await run_output(runner, shell(fill(6), limits=sized()))
        assert (info.status, int(data)) == ("completed", 6 * MIB)
        assert len(records(disk.path)) == 2
        await full.stop(grace=0)
        await runner.remove(info.job_id)
        await runner.remove(full.job_id)
    await until_left(disk.path, 0)


async def test_a_job_that_does_not_say_has_the_configured_size(disk: Disk) -> None:
    async with open_runner(disk.path, work_quota=SIZE) as runner:
        info, data = await run_output(runner, shell(fill(20)))
        assert runner.defaults.work_size == info.limits.work_size == SIZE
        await runner.remove(info.job_id)
    assert disk.told in data
    async with open_runner(disk.path, ceilings=sized(), work_quota=2 * SIZE) as runner:
        assert runner.defaults.work_size == SIZE
    async with open_runner(disk.path, work_quota=None) as runner:
        info, data = await run_output(runner, shell(fill(20)))
        assert (info.work, info.limits.work_size, int(data)) == ("disk", None, 20 * MIB)


@BOTH
async def test_a_job_cannot_leave_its_project(disk: Disk) -> None:
    limits = replace(SMALL, work_size=SIZE)
    attack = ("projects", "leave_project", "/work", "20")
    async with open_arena(disk.path) as arena:
        assert (await arena.attack(*attack, limits=limits)).text == "refused: EPERM"
        assert (
            await arena.attack("bombs", "fill", "/work/bomb", "20", limits=limits)
        ).text == f"refused: {errno.errorcode[disk.full]}"
        assert (await arena.attack(*attack, limits=limits, without=["seccomp"])).text == "succeeded: 20 MiB"


@BOTH
async def test_what_a_job_makes_in_a_directory_is_its_projects(disk: Disk) -> None:
    limits = replace(SMALL, work_size=SIZE)
    attack, full = ("projects", "stop_inheriting", "/work", "20"), errno.errorcode[disk.full]
    async with open_arena(disk.path) as arena:
        assert (await arena.attack(*attack, limits=limits)).text == "refused: EPERM"
        assert (await arena.attack("projects", "fill_unnamed", "/work", "20", limits=limits)).text == f"refused: {full}"
        assert (await arena.attack(*attack, limits=limits, without=["seccomp"])).text == "succeeded: 20 MiB"
        assert (await arena.attack("projects", "fill_unnamed", "/work", "20", limits=SMALL)).text == "succeeded: 20 MiB"


@BOTH
async def test_nothing_comes_into_a_project_from_a_directory_beside_it(disk: Disk) -> None:
    """A volume on the same file system, which nothing bounds. With the control, a directory that has no project either."""
    data, free = disk.path / "data", disk.path / "free"
    for made in (data, free):
        made.mkdir()
        os.chown(made, OWNER, OWNER)
    (data / "large").write_bytes(b"x" * 20 * MIB)
    os.chown(data / "large", OWNER, OWNER)
    ways = {
        "link": "EXDEV",
        "link_unnamed": "EXDEV",
        "clone": errno.errorcode[errno.EOPNOTSUPP] if disk.full == errno.EDQUOT else "ENOSPC",
        "rename": "EXDEV",
    }
    async with open_arena(disk.path, offers=Offers(volumes={"data": Volume(data)})) as arena:
        for way, why in ways.items():
            told = await arena.attack(
                "projects", way, "/volumes/data", "/work", limits=replace(SMALL, work_size=SIZE), volumes=["data"]
            )
            assert (way, told.text) == (way, f"refused: {why}")
    for way, why in ways.items():
        (free / "large").unlink(missing_ok=True)
        assert outside("projects", way, str(data), str(free)).startswith(
            "refused" if why == errno.errorcode[errno.EOPNOTSUPP] else "succeeded"
        )


async def test_what_ended_jobs_have_on_disk_is_counted_with_their_output(disk: Disk) -> None:
    async with open_runner(disk.path, keep_bytes=10 * MIB) as runner:
        first = await run(runner, shell(fill(6), limits=sized()))
        second = await run(runner, shell(fill(6), limits=sized()))
        with fail_after(20):
            while first.job_id in runner.catalog.jobs:  # noqa: ASYNC110  # retention runs beside, and tells nobody
                await anyio.sleep(0.1)
        assert second.job_id in runner.catalog.jobs
        assert 6 * MIB <= runner.catalog.jobs.size < 7 * MIB
        await runner.remove(second.job_id)


async def test_a_removal_that_a_crash_cut_short_frees_the_project(disk: Disk) -> None:
    async with open_runner(disk.path) as runner:
        info = await run(runner, shell(fill(6), limits=sized()))
        state = runner.state.path
    assert len(records(disk.path)) == 1
    (state / "jobs" / info.job_id).rename(state / "removed" / info.job_id)
    async with open_runner(disk.path):
        await until_left(disk.path, 0)


@BOTH
async def test_jobs_that_start_at_once_have_a_project_each_and_none_is_left_for_more(disk: Disk) -> None:
    spec = JobSpec("sleep", ("600",), limits=sized())
    async with open_runner(disk.path, project_ids=(0x71000000, 4)) as runner:
        jobs = await asyncio.gather(*(runner.start(spec) for _ in range(4)))
        assert sorted(records(disk.path)) == [0x71000000 + number for number in range(4)]
        with pytest.raises(LimitReached, match="cannot start job: no free one was found of 4 project ids"):
            await runner.start(spec)
        assert (runner.running, len(list(runner.state.jobs.iterdir()))) == (4, 4)
        await jobs[0].stop(grace=0)
        await runner.remove(jobs[0].job_id)
        await until_left(disk.path, 3)
        again = await runner.start(spec)
        for job in [again, *jobs[1:]]:
            await job.stop(grace=0)
            await runner.remove(job.job_id)


async def test_a_job_keeps_its_size_over_a_restart(disk: Disk) -> None:
    state = disk.path / "state"
    async with JobRunner.open(RunnerConfig(state_dir=state)) as runner:
        job_id = (await runner.start(shell("until [ -e go ]; do sleep 0.2; done; " + fill(20), limits=sized()))).job_id
    async with open_runner(disk.path) as runner:
        other = await run(runner, shell("true", limits=sized()))
        assert len(records(disk.path)) == 2
        (state / "jobs" / job_id / "work" / "go").touch()
        job = await runner.get(job_id)
        assert disk.told in await output(job)
        await job.wait()
        for one in (job_id, other.job_id):
            await runner.remove(one)


async def use(runner: JobRunner, script: str) -> bytes:
    with fail_after(20):
        job = await runner.start(shell(script, workspace="build", limits=sized()), user="ann")
        data = await output(job)
        await job.wait()
    await runner.remove(job.job_id)
    return data


@BOTH
async def test_a_workspace_has_its_size_over_all_jobs(disk: Disk) -> None:
    async with open_runner(disk.path, workspaces=True, workspace_size=SIZE) as runner:
        assert int(await use(runner, fill(6, "one"))) == 6 * MIB
        assert disk.told in await use(runner, fill(6, "two"))
        held = await runner.start(shell("exec sleep 600", workspace="build"), user="ann")
        (one,) = await runner.list_workspaces()
        assert one.held_by == held.job_id and one.size is not None and SIZE - 256 * 1024 <= one.size <= SIZE
        await held.stop(grace=0)
        await runner.remove(held.job_id)
        await runner.remove_workspace("ann", "build")
    await until_left(disk.path, 0)


async def test_the_size_of_workspaces_can_be_changed(disk: Disk) -> None:
    for size, bound in ((SIZE, SIZE), (2 * SIZE, 2 * SIZE), (None, 0)):
        async with open_runner(disk.path, workspaces=True, workspace_size=size) as runner:
            await use(runner, "true")
            await until_left(disk.path, 1)
            assert [found.most_bytes for found in records(disk.path).values()] == [bound]
    async with open_runner(disk.path, workspaces=True, workspace_size=SIZE) as runner:
        await runner.remove_workspace("ann", "build")


async def test_a_workspace_that_cannot_be_counted_is_refused(disk: Disk) -> None:
    async with open_runner(disk.path, workspaces=True) as runner:
        await use(runner, "echo old > file")
        await until_left(disk.path, 0)
    async with open_runner(disk.path, workspaces=True, workspace_size=SIZE) as runner:
        with pytest.raises(StartFailed, match="build was made without workspace_size.*jobrunner workspace rm build"):
            await use(runner, "true")
        assert runner.running == 0
        await runner.remove_workspace("ann", "build")
        assert await use(runner, "ls -A") == b""
        await until_left(disk.path, 1)
        assert [one.most_bytes for one in records(disk.path).values()] == [SIZE]
        await runner.remove_workspace("ann", "build")


async def test_an_operators_project_around_the_state_directory_is_left_alone(disk: Disk) -> None:
    """Its number is none of the server's: nothing of its record is cleared with a job, and directories in it can be bounded."""
    theirs = 7
    around = disk.path / "around"
    around.mkdir()
    Projects(disk.path, theirs, 1).bound(around, 64 * MIB)
    before = records(disk.path)[theirs]
    async with open_runner(around, workspaces=True, workspace_size=SIZE) as runner:
        await use(runner, fill(2))
        info = await run(runner, shell(fill(2), limits=Limits(work_size=SIZE)))
        await until_left(disk.path, 3)
        await runner.remove(info.job_id)
        await runner.remove_workspace("ann", "build")
    await until_left(disk.path, 1)
    assert records(disk.path)[theirs].most_bytes == before.most_bytes == 64 * MIB
