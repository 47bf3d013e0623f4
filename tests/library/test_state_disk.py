"""The state directory's disk lets the server down: full, read-only, or the directory is removed. Told, and jobs end as ever."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from jobrunner import JobSpec, StartFailed
from jobrunner.errors import HostError, JobNotFound, JobRemoved
from jobrunner.requests import KEEP, RequestIds, request_key
from tests.support.runner import cgroup_directories, open_runner, output, processes_with, run, shell
from tests.support.timing import fail_after

pytestmark = [pytest.mark.requires("root", "command:mkfs.ext4"), pytest.mark.timeout(60)]

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system that becomes read-only when it meets an error, as most hosts' do."""
    image, point = tmp_path / "image", tmp_path / "disk"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m0", "-b4096", image], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, point], check=True)
    yield point
    subprocess.run(["umount", "-l", point], check=True)


def fill(disk: Path) -> Path:
    """Take every block that is left."""
    file = disk / "full"
    with file.open("wb", buffering=0) as out:
        for size in (MIB, 4096):
            try:
                while True:
                    out.write(b"x" * size)
            except OSError:
                continue
    with pytest.raises(OSError, match="No space"):
        (disk / "new").write_bytes(b"x" * 4096)
    (disk / "new").unlink()
    return file


def make_read_only(disk: Path) -> None:
    """The kernel does it, files that are open for writing or not (Documentation/admin-guide/ext4.rst)."""
    device = disk.stat().st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a test\n")
    with pytest.raises(OSError, match="Read-only"):
        (disk / "new").touch()


async def test_on_a_full_disk_starts_fail_and_everything_else_works(disk: Path) -> None:
    once = shell("echo out", request_id="once")
    stale = RequestIds(disk / "state" / "requests")
    async with open_runner(disk) as runner:
        ended, running = await run(runner, once), await runner.start(shell("echo up; sleep 100"))
        key = request_key("", "stale")
        stale.remember(key, "ab" * 32, "0123456789ab")
        stale.append([key], time.time() - 2 * KEEP)
        full = fill(disk)
        with pytest.raises(StartFailed, match="record: No space left on device"):
            await runner.start(JobSpec("true"))
        assert sorted(os.listdir(disk / "state" / "jobs")) == sorted([ended.job_id, running.job_id])
        info = await running.stop(by="alice")
        assert (info.end_reason, info.stopped_by) == ("stopped", "alice")
    async with open_runner(disk) as runner:  # with a file that it would shorten
        assert await output(await runner.get(ended.job_id)) == b"out\n"
        await runner.remove(ended.job_id)
        with pytest.raises(JobRemoved):
            await runner.start(once)
        full.unlink()
        assert (await run(runner, JobSpec("true"))).exit_code == 0
    async with open_runner(disk) as runner:
        with pytest.raises(JobRemoved):
            await runner.start(once)


async def test_on_a_disk_that_became_read_only_what_would_change_it_is_refused_and_told(disk: Path) -> None:
    marker = f"1000.{time.time_ns() % 10**9}"
    async with open_runner(disk) as runner:
        ended, running = await run(runner, shell("echo out; exit 3")), await runner.start(JobSpec("sleep", (marker,)))
        make_read_only(disk)
        with pytest.raises(StartFailed, match="record: Read-only file system"):
            await runner.start(JobSpec("true"))
        with pytest.raises(HostError, match=f"cannot remove job {ended.job_id}: Read-only file system"):
            await runner.remove(ended.job_id)
        assert (await runner.get(ended.job_id)).info() == ended
        assert await output(await runner.get(ended.job_id)) == b"out\n"
        with fail_after(10):
            info = await running.stop(grace=1)
        assert info.end_reason == "lost"  # its shim could not write how it ended
        assert len(await runner.list()) == 2
    assert processes_with(marker) == cgroup_directories(running.job_id) == []
    with pytest.raises(HostError, match="cannot use state directory .*: Read-only file system"):
        async with open_runner(disk):
            pass


async def test_retention_on_a_read_only_disk_waits(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_runner(disk, keep_jobs=1) as runner:
        running = await runner.start(shell("sleep 100"))
        first = await run(runner, JobSpec("true"))
        make_read_only(disk)
        await running.stop(grace=0)
        assert {job.job_id for job in await runner.list()} == {first.job_id, running.job_id}
        with fail_after(10):
            while "cannot remove job" not in caplog.text:  # noqa: ASYNC110 - it tells nobody else
                await anyio.sleep(0.01)
        await anyio.sleep(0.1)  # what would come at once again
        assert {job.job_id for job in await runner.list()} == {first.job_id, running.job_id}
    assert caplog.text.count("cannot remove job") == 1


async def test_a_state_directory_that_is_removed_leaves_a_server_that_can_stop_its_jobs(tmp_path: Path) -> None:
    marker = f"1000.{time.time_ns() % 10**9}"
    async with open_runner(tmp_path) as runner:
        running = await runner.start(JobSpec("sleep", (marker,)))
        shutil.rmtree(tmp_path / "state")
        with pytest.raises(StartFailed, match="record: No such file or directory"):
            await runner.start(JobSpec("true"))
        assert running.status == "running"
        with fail_after(10):
            assert (await running.stop(grace=1)).end_reason == "lost"
        with pytest.raises(JobNotFound):
            await runner.get(running.job_id)
    assert processes_with(marker) == cgroup_directories(running.job_id) == []
    async with open_runner(tmp_path) as runner:
        assert (await run(runner, JobSpec("true"))).exit_code == 0
        assert len(await runner.list()) == 1


async def test_a_second_runner_is_refused_by_whatever_name_the_directory_has(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell("sleep 100"))
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "state").symlink_to(tmp_path / "state")
        with pytest.raises(HostError, match="another server holds it"):
            async with open_runner(tmp_path / "other"):
                pass
        assert job.status == "running"
