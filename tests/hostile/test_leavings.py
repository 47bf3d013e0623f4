"""What a job leaves in its work directory is taken over and removed by root: nothing outside is touched, and all of it goes."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import anyio.to_thread
import pytest

from jobrunner.linux.tree import reown_tree
from jobrunner.runner import RunnerJob
from tests.hostile.arena import PYTHON, Arena, open_arena, program
from tests.hostile.meeting import Meeting, take_over
from tests.support.timing import at_most, fail_after

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


def by_path(top: Path) -> None:
    """As somebody would who thinks of no enemy: the kernel takes no path that is so long."""
    (top / "/".join(["deep"] * 1500)).lstat()


def following(top: Path) -> None:
    """Likewise: what a link leads to is given away with it."""
    for path in top.iterdir():
        os.chown(path, 1, 1)


@pytest.mark.parametrize(
    ("attack", "careless"), [(("deep", "1500"), by_path), (("links_out", "TARGET"), following)], ids=["deep", "links"]
)
async def test_a_careless_walk_would_be_hurt(
    arena: Arena, attack: tuple[str, ...], careless: Callable[[Path], None], tmp_path: Path
) -> None:
    """The control of what is left: the same tree, and another way to take it over."""
    target = tmp_path / "target"
    target.touch()
    job = await arena.start(*program("leavings", *(str(target) if word == "TARGET" else word for word in attack)))
    assert (await arena.outcome(job)).word == "succeeded"
    work = arena.runner.state.directory(job.job_id) / "work"
    await arena.runner.settled()
    reown_tree(work)
    assert target.stat().st_uid == 0
    if careless is by_path:
        with pytest.raises(OSError, match="File name too long"):
            careless(work)
    else:
        careless(work)
        assert target.stat().st_uid == 1
    await arena.runner.remove(job.job_id)  # or pytest would be hurt by it


@pytest.mark.requires("command:mkfs.btrfs")
async def test_no_file_system_is_left_below_a_directory(tmp_path: Path) -> None:
    """On btrfs its owner may make one, and what is in a read-only one not even root removes by unlink(2)."""
    image, here = tmp_path / "image", tmp_path / "here"
    with image.open("wb") as file:
        file.truncate(128 << 20)
    here.mkdir()
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)  # noqa: ASYNC221
    subprocess.run(["mount", "-o", "loop", image, here], check=True)  # noqa: ASYNC221
    try:
        here.chmod(0o755)
        async with open_arena(here) as arena:
            assert (await arena.attack("projects", "make_subvolume", "/work")).text == "refused: EPERM"
            free = await arena.start(*program("projects", "make_subvolume", "/work"), without=["seccomp"])
            assert (await arena.outcome(free)).text == "succeeded: made"
            await arena.runner.settled()
            with pytest.raises(OSError, match="another file system"):
                reown_tree(arena.runner.state.directory(free.job_id) / "work")
    finally:
        subprocess.run(["umount", here], check=True)  # noqa: ASYNC221


STRANGER = """
import os, sys, time
fd, n = int(sys.argv[1]), 0
while True:
    try:
        os.mkdir(f"stranger-{n}", dir_fd=fd)
        os.rename(f"stranger-{n}", f"moved-{n}", src_dir_fd=fd, dst_dir_fd=fd)
        os.rmdir(f"moved-{n}", dir_fd=fd)
    except OSError as exc:
        print(type(exc).__name__, flush=True)
        sys.exit()
    if n == 0: print("in", flush=True)
    n += 1
"""
SOMEBODY = 12345


async def test_a_stranger_with_a_directory_of_the_job_is_shut_out_when_it_ends(arena: Arena) -> None:
    """Another job that was handed it over a socket could go on there for ever, and get in the way of whoever cleans up."""
    with Meeting() as meeting:
        job = await arena.start(*program("sockets", "hand_over_directory", meeting.inside), change={"volumes": [meeting.volume]})
        connection, directory = await anyio.to_thread.run_sync(take_over, meeting.listener)
        with subprocess.Popen(  # noqa: ASYNC220
            [PYTHON, "-c", STRANGER, str(directory)], pass_fds=[directory], user=SOMEBODY, stdout=subprocess.PIPE, text=True
        ) as stranger:
            os.close(directory)
            assert stranger.stdout is not None
            assert stranger.stdout.readline() == "in\n"
            connection.close()
            assert (await arena.outcome(job)).word == "succeeded"
            await arena.runner.settled()
            said = stranger.communicate(timeout=at_most(20))[0]
    assert said == "PermissionError\n"
    assert_taken_over(arena.runner.state.directory(job.job_id) / "work", job)
    await arena.runner.remove(job.job_id)
    assert not arena.runner.state.directory(job.job_id).exists()


async def test_hard_links_to_files_of_the_host_cannot_be_made(arena: Arena) -> None:
    """Another mount; and where it is the same, not ours (protected_hardlinks)."""
    assert (await arena.attack("leavings", "hard_link", "/etc/passwd")).text == "refused: EXDEV"
    with Meeting() as meeting:
        secret = meeting.directory / "secret"
        secret.touch(0o600)
        link = ("leavings", "hard_link", "/volumes/shared/secret", "/volumes/shared/hard")
        volumes = {"volumes": [meeting.volume]}
        assert (await arena.attack(*link, change=volumes)).text == "refused: EPERM"
        assert (await arena.attack(*link, change=volumes, without=["uid", "capabilities"])).text == "succeeded: linked"
        assert secret.stat().st_nlink == 2
