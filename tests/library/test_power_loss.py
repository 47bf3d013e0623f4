"""The host loses power: what was answered before is there after.

The state directory is on an ext4 file system in a file, and that file on btrfs, where a clone of it is taken at one instant
(ioctl_ficlonerange(2)): it has what the disk had then, and nothing that was only in memory. Jobs are started, end, are
stopped and removed while clones are taken; then each clone is mounted in the place of the disk, and a runner opened on it.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobrunner import JobSpec
from jobrunner.config import RunnerConfig
from jobrunner.errors import JobNotFound, JobRemoved
from jobrunner.job import Gap
from jobrunner.runner import JobRunner
from tests.support.runner import open_runner, output, shell
from tests.support.timing import fail_after

pytestmark = [pytest.mark.requires("root", "command:mkfs.btrfs", "command:mkfs.ext4"), pytest.mark.timeout(120)]

CLONES = 8


def sh(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class Disk:
    """An ext4 file system at `point`, and clones of what is on it."""

    def __init__(self, path: Path) -> None:
        self.point = path / "disk"
        self._below = path / "below"
        for directory in (self.point, self._below):
            directory.mkdir()
        for name, size, mkfs in (("below.img", 400 << 20, "mkfs.btrfs"), ("below/disk.img", 48 << 20, "mkfs.ext4")):
            with (path / name).open("wb") as file:
                file.truncate(size)
            sh(mkfs, "-q", path / name)
            sh("mount", "-o", "loop", path / name, path / Path(name).stem)

    def clone(self, number: int) -> None:
        sh("cp", "--reflink=always", self._below / "disk.img", self._below / f"{number}.img")

    def replace(self, number: int) -> None:
        sh("umount", self.point)
        sh("mount", "-o", "loop", self._below / f"{number}.img", self.point)

    def close(self) -> None:
        for point in (self.point, self._below):
            subprocess.run(["umount", "-l", point], check=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    try:
        yield made
    finally:
        made.close()


@dataclass(slots=True)
class Known:
    """What had been answered at an instant: ids of jobs."""

    started: set[str] = field(default_factory=set)
    ended: dict[str, int] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    removed: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Known:
        return Known(set(self.started), dict(self.ended), set(self.stopped), dict(self.removed))


async def live(runner: JobRunner, known: Known, choice: random.Random) -> None:
    """One job's life, and what of it was answered."""
    code, request = choice.randrange(1, 256), f"{choice.getrandbits(64):x}"
    stopped = choice.random() < 0.3
    last = "exec sleep 100" if stopped else f"exit {code}"
    spec = shell(f"echo begin; sleep {choice.uniform(0, 0.3)}; echo end; {last}", request_id=request)
    job = await runner.start(spec)
    known.started.add(job.job_id)
    if stopped:
        await asyncio.sleep(choice.uniform(0, 0.2))
        await job.stop(grace=0)
        known.stopped.add(job.job_id)
    else:
        await job.wait()
        known.ended[job.job_id] = code
    if choice.random() < 0.3:
        known.ended.pop(job.job_id, None)
        known.stopped.discard(job.job_id)
        known.started.discard(job.job_id)
        await runner.remove(job.job_id)
        known.removed[job.job_id] = request


async def check(path: Path, before: Known, after: Known) -> None:
    async with open_runner(path) as runner:
        there = {job.job_id: await job.wait() for job in await runner.list()}
        for job_id in before.started & after.started:
            assert job_id in there, "a start that was answered is gone"
        for job_id, code in before.ended.items():
            if job_id in after.ended:
                assert (there[job_id].end_reason, there[job_id].exit_code) == ("exited", code)
                assert await output(await runner.get(job_id)) == b"begin\nend\n"
        for job_id in before.stopped & after.stopped:
            assert there[job_id].end_reason == "stopped"
        for job_id, request in before.removed.items():
            with pytest.raises(JobNotFound):
                await runner.get(job_id)
            with pytest.raises(JobRemoved):  # found before what was asked for is compared: it is the same user's
                await runner.catalog.started(request, job_id)
        for job_id in there:
            async with (await runner.get(job_id)).log() as reader:
                parts = [part async for part in reader]
            lost = there[job_id].end_reason == "lost"
            assert all(lost and part.reason == "lost" for part in parts if isinstance(part, Gap)), (there[job_id], parts)
            data = b"".join(part.data for part in parts if not isinstance(part, Gap))
            # What the disk had made room for, and had not got, are zeros: that may be where nothing was synced.
            assert b"begin\nend\n".startswith(data.rstrip(b"\0") if lost else data)
        assert (await (await runner.start(JobSpec("true"))).wait()).exit_code == 0
    assert os.listdir(path / "state" / "corrupt") == []


async def lose_power(disk: Disk) -> None:
    """Many times, at some moments."""
    choice = random.Random(os.environ.get("JOBRUNNER_CRASH_SEED", "power"))
    known, instants = Known(), []
    over = asyncio.Event()

    async def load(runner: JobRunner) -> None:
        while not over.is_set():
            await live(runner, known, choice)

    async with JobRunner.open(RunnerConfig(state_dir=disk.point / "state")) as runner:
        lives = [asyncio.create_task(load(runner)) for _ in range(4)]
        for number in range(CLONES):
            await asyncio.sleep(choice.uniform(0.1, 0.5))
            before = known.copy()
            await asyncio.to_thread(disk.clone, number)
            instants.append((before, known.copy()))
        over.set()
        with fail_after(30):
            await asyncio.gather(*lives)
    for number, (before, after) in enumerate(instants):
        disk.replace(number)
        with fail_after(30):
            await check(disk.point, before, after)
    assert sum(len(before.ended) + len(before.removed) for before, _ in instants) > CLONES


async def test_what_was_answered_before_a_power_loss_is_there_after_it(disk: Disk) -> None:
    await lose_power(disk)


async def test_without_its_syncs_a_server_would_lose_what_was_answered(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    with pytest.raises(AssertionError):
        await lose_power(disk)
