"""What a job leaves in its work directory is taken over and removed by root: nothing outside is touched, and all of it goes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from jobrunner.runner import RunnerJob
from tests.hostile.arena import Arena, program
from tests.support.timing import fail_after

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.requires("root", "command:python3")]

LEAVINGS = {
    "a tree that is deeper than Python recurses": ("deep", "1500"),
    "links to what is not its own": ("links_out", "/etc/passwd", "/etc", "/", "/proc/1", "/no/such", "../../../.."),
    "many files, strange names, closed directories": ("zoo", "3000"),
}


@pytest.mark.parametrize("attack", LEAVINGS.values(), ids=LEAVINGS)
async def test_what_is_left_is_taken_over_and_removed(arena: Arena, attack: tuple[str, ...], tmp_path: Path) -> None:
    runner = arena.runner
    before = [os.lstat(path) for path in ("/etc/passwd", "/etc", "/")]
    with fail_after(40):
        job = await arena.start(*program("leavings", *attack))
        outcome = await arena.outcome(job)
        await runner.settled()
    assert outcome.word == "succeeded", outcome
    work = runner.state.directory(job.job_id) / "work"
    assert_taken_over(work, job)
    with fail_after(40):
        await runner.remove(job.job_id)
    assert not work.parent.exists()
    assert [names(runner.state.path / place, job.job_id) for place in ("jobs", "removed", "running")] == [False] * 3
    after = [os.lstat(path) for path in ("/etc/passwd", "/etc", "/")]
    assert [(one.st_uid, one.st_ino) for one in after] == [(one.st_uid, one.st_ino) for one in before]


def names(directory: Path, job_id: str) -> bool:
    return any(job_id in name for name in os.listdir(directory))


def assert_taken_over(work: Path, job: RunnerJob) -> None:
    """The top levels, and that nothing is setuid: the depth is test_tree's."""
    assert work.lstat().st_uid == 0
    for entry in work.iterdir():
        info = entry.lstat()
        assert info.st_uid == 0, entry
        assert stat.S_ISLNK(info.st_mode) or info.st_mode & 0o6000 == 0, entry
    assert job.record.uid not in job._runner.identities._taken


async def test_hard_links_to_files_of_the_host_cannot_be_made(arena: Arena) -> None:
    """Another mount; and where it is the same, not ours (protected_hardlinks)."""
    assert (await arena.attack("leavings", "hard_link", "/etc/passwd")).text == "refused: EXDEV"
