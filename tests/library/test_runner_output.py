"""What becomes of output past its limit and on a full disk, as the library tells it; the runner itself goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner import Gap, JobStatus, Limits, OutputPolicy
from jobrunner.errors import InvalidRequest, StartFailed
from jobrunner.output import Chunk
from jobrunner.runner import RunnerJob
from tests.support.runner import open_runner, output, run, shell
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

KIB = 1 << 10
FLOOD = "head -c 5000000 /dev/zero"


async def parts_of(job: RunnerJob) -> tuple[list[Chunk | Gap], int]:
    """All that a follower from the first byte is given, and the total that it is told at the end."""
    with fail_after(20):
        async with job.log() as reader:
            parts = [part async for part in reader]
    assert reader.end is not None
    return parts, reader.end.total_bytes


async def test_a_job_that_does_not_say_keeps_the_configured_output(tmp_path: Path) -> None:
    async with open_runner(tmp_path, defaults=Limits(output_limit=64 * KIB, output_policy=OutputPolicy.STOP)) as runner:
        info = await run(runner, shell(FLOOD))
        assert (info.limits.output_limit, info.limits.output_policy) == (64 * KIB, OutputPolicy.STOP)
        assert info.end_reason == "output_limit"
        info = await run(runner, shell(FLOOD, limits=Limits(output_policy=OutputPolicy.DROP_OLDEST)))
        assert info.end_reason == "exited"


async def test_an_output_limit_above_the_ceiling_is_refused(tmp_path: Path) -> None:
    ceilings = Limits(output_limit=1 << 30)
    async with open_runner(tmp_path, ceilings=ceilings) as runner:
        with pytest.raises(InvalidRequest, match=r"limits\.output_limit"):
            await runner.start(shell("true", limits=Limits(output_limit=(1 << 30) + 1)))


async def test_info_tells_the_first_offset_that_is_still_there(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell(FLOOD, limits=Limits(output_limit=64 * KIB)))
        with fail_after(20):
            info = await job.wait()
        assert info.log_end == 5_000_000
        assert 5_000_000 - 64 * KIB < info.log_start < 5_000_000 - 40 * KIB
        parts, total = await parts_of(job)
    assert parts[0] == Gap(0, info.log_start - 1, "dropped")
    assert sum(len(part.data) for part in parts if isinstance(part, Chunk)) == 5_000_000 - info.log_start
    assert total == 5_000_000


async def test_what_is_there_is_told_at_any_moment_of_a_flood(tmp_path: Path) -> None:
    """Segments come and go while they are looked at; the bounds never go back."""
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell("yes", limits=Limits(output_limit=64 * KIB)))
        seen = [(0, 0)]
        with fail_after(20):
            while seen[-1][0] < 3_000_000:
                info = job.info()
                seen.append((info.log_start, info.log_end))
    assert seen == sorted(seen)
    assert [end for _, end in seen] == sorted(end for _, end in seen)
    assert all(start <= end for start, end in seen)


async def test_a_job_that_is_ended_by_its_limit_says_so_and_what_helps(tmp_path: Path) -> None:
    limits = Limits(output_limit=64 * KIB, output_policy=OutputPolicy.STOP)
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell("yes", limits=limits, grace=1))
        parts, total = await parts_of(job)
        info = await job.wait()
    assert (info.status, info.end_reason) == (JobStatus.TERMINATED, "output_limit")
    assert "65536 bytes" in info.message
    assert "higher output limit" in info.message
    kept = sum(len(part.data) for part in parts if isinstance(part, Chunk))
    assert 60 * KIB < kept < 64 * KIB
    assert parts[-1] == Gap(kept, total - 1, "output_limit")
    assert (info.log_start, info.log_end) == (0, total)


# -- a state directory on a disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


async def test_a_runner_on_a_full_disk_serves_what_is_there_and_stops_jobs(small_disk: Path) -> None:
    async with open_runner(small_disk) as runner:
        early = await runner.start(shell("echo early"))
        await early.wait()
        waiting = await runner.start(shell("echo waiting; exec sleep 100"))
        flooding = await runner.start(shell(f"{FLOOD}; exec sleep 100"))
        with fail_after(20):
            async with flooding.log() as reader:
                first = await anext(reader)
                assert isinstance(first, Chunk)
            while _fill(small_disk):
                pass
            assert await output(early) == b"early\n"
            with pytest.raises(StartFailed):
                await runner.start(shell("echo late"))
            info = await waiting.stop(by="somebody")
            assert (info.status, info.end_reason) == (JobStatus.TERMINATED, "stopped")
            assert (await flooding.stop(grace=0)).end_reason == "stopped"
            parts, total = await parts_of(flooding)
            assert isinstance(parts[-1], Gap) and parts[-1].reason == "write_error"
            assert total == parts[-1].last + 1 == flooding.info().log_end <= 5_000_000
        await runner.remove(flooding.job_id)
        (small_disk / "ballast").unlink()
        assert (await run(runner, shell("exit 3"))).exit_code == 3, "with room again jobs start"


def _fill(directory: Path) -> bool:
    """Take what is left of a disk; whether there was anything."""
    with (directory / "ballast").open("ab", buffering=0) as file:
        try:
            return bool(file.write(bytes(4096)))
        except OSError:
            return False


async def test_a_write_error_ends_a_job_where_the_configuration_says_so(small_disk: Path) -> None:
    async with open_runner(small_disk, on_write_error="stop") as runner:
        job = await runner.start(shell(f"{FLOOD}; exec sleep 100"))
        parts, total = await parts_of(job)
        info = await job.wait()
        assert (info.status, info.end_reason) == (JobStatus.TERMINATED, "log_error")
        assert "on_write_error" in info.message
        assert isinstance(parts[-1], Gap) and parts[-1].reason == "write_error"
        assert total == parts[-1].last + 1 == info.log_end <= 5_000_000
