"""Where /work is, and what bounds it, on a file system without project quotas; with them: tests/vm/test_quota.py."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobrunner import JobSpec, Limits
from jobrunner.config import RunnerConfig
from jobrunner.errors import HostError
from jobrunner.identity import range_of
from jobrunner.linux.check_work import work, workspaces
from jobrunner.linux.finding import Level
from jobrunner.record import JobRecord, pack_record, parse_record
from jobrunner.runner import JobRunner
from jobrunner.sandbox import needs
from tests.support.runner import open_runner, run_output, shell

pytestmark = pytest.mark.requires("root")

MIB = 1 << 20
WHERE = "stat -f -c %T /work"


@pytest.fixture
def memory() -> Iterator[Path]:
    """Whatever this host's disks are, a tmpfs of this kernel has no project quotas."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


async def test_a_work_directory_that_has_a_size_is_memory_and_else_with_the_record(memory: Path) -> None:
    async with open_runner(memory) as runner:
        sized, data = await run_output(
            runner, shell("exec 2>&1; head -c 3M /dev/zero > x; stat -c %s x", limits=Limits(work_size=MIB))
        )
        free, _ = await run_output(runner, shell("touch left"))
        assert runner.defaults.work_size is None
        works = [list((runner.state.directory(info.job_id) / "work").iterdir()) for info in (sized, free)]
    assert (sized.work, sized.limits.work_size) == ("memory", MIB)
    assert b"No space left on device" in data and data.endswith(b"%d\n" % MIB)
    assert (free.work, free.limits.work_size) == ("disk", None)
    assert [[path.name for path in work] for work in works] == [[], ["left"]]


async def test_a_size_of_workspaces_that_cannot_be_kept_is_refused(memory: Path) -> None:
    config = RunnerConfig(state_dir=memory / "state", workspaces=True, workspace_size=MIB)
    refusal = "workspaces: workspace_size = 1MiB cannot be kept: .*/state is on tmpfs without project quotas; project quotas: ext4"
    with pytest.raises(HostError, match=refusal):
        async with JobRunner.open(config):
            pass
    async with JobRunner.open(replace(config, workspaces=False)):
        pass


def test_the_check_says_what_bounds_work_directories_and_the_remedy(memory: Path) -> None:
    config = RunnerConfig(state_dir=memory / "not/yet/there")
    free = work(needs(config))
    assert (free.level, free.remedy.count("prjquota")) == (Level.LIMITED, 3)
    assert free.what.partition(": ")[2] == f"{config.state_dir} is on tmpfs without project quotas"
    sized = work(needs(replace(config, defaults=replace(config.defaults, work_size=MIB))))
    assert sized.level is Level.OK and sized.what.startswith("in memory, 1MiB for a job that does not say")
    assert workspaces(needs(config)).level is Level.OK
    assert workspaces(needs(replace(config, workspaces=True))).level is Level.LIMITED
    assert workspaces(needs(replace(config, workspaces=True, workspace_size=MIB))).level is Level.MISSING


def test_records_of_servers_that_did_not_tell_are_read(tmp_path: Path) -> None:
    record = JobRecord("0123456789ab", JobSpec("true"), Limits(work_size=MIB), "ann", "host", 1.0, "", work="memory")
    assert parse_record(pack_record(record), record.job_id).work == "memory"
    old = pack_record(record).replace(b', "work": "memory"', b"")
    assert parse_record(old, record.job_id).work == "memory"
    assert parse_record(old.replace(b'"work_size": 1048576', b'"work_size": null'), record.job_id).work == "disk"


def test_uids_are_a_range_by_the_state_directory(tmp_path: Path) -> None:
    ranges = {range_of(tmp_path / str(number)) for number in range(100)}
    assert len(ranges) > 80
    assert all(0x70000000 <= first < first + count <= 0x80000000 and first % count == 0 for first, count in ranges)
    (tmp_path / "link").symlink_to(tmp_path)
    assert RunnerConfig(state_dir=tmp_path / "link" / "1").job_uids == range_of(tmp_path / "1")
    assert RunnerConfig(state_dir=tmp_path, job_uids=(5, 6)).job_uids == (5, 6)
