"""Workspaces under attack: whatever a job leaves in one, `workspace ls` and `rm` follow nothing, and all of it goes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from jobrunner.errors import InvalidRequest
from jobrunner.runner import JobRunner
from tests.support.flags import chattr, flags_lifted
from tests.support.runner import open_runner, output, shell
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root", "command:python3", "command:chattr")

VICTIM = "VICTIM"
"""In scripts: a directory of the host's."""


def python(script: str) -> str:
    return f"python3 - <<'END'\nimport os, socket\n{script}\nEND\n"


def is_link_out(files: Path) -> None:
    assert (files / "directory" / "file").read_text() == "theirs"
    assert (files / "file").read_bytes() == Path("/etc/passwd").read_bytes()


def is_too_deep(files: Path) -> None:
    with pytest.raises(OSError, match="File name too long") as caught:
        Path(f"{files}{'/d' * 3000}").lstat()
    assert caught.value.errno == errno.ENAMETOOLONG


def is_closed(files: Path) -> None:
    assert [stat.S_IMODE((files / name).lstat().st_mode) for name in ("closed", "setuid")] == [0, 0o6777]


def has_strange_names(files: Path) -> None:
    assert {b"-rf", b"\xff\n", b"*", b" ", b"x" * 255} <= set(os.listdir(os.fsencode(files)))


def has_what_is_no_file(files: Path) -> None:
    assert stat.S_ISFIFO((files / "fifo").stat().st_mode) and stat.S_ISSOCK((files / "socket").stat().st_mode)


def has_links(files: Path) -> None:
    assert (files / "one").stat().st_nlink == 501


def is_sparse(files: Path) -> None:
    assert (files / "huge").stat().st_size == 1 << 40


def is_moved(files: Path) -> None:
    assert (files / "a" / "b" / "a").is_dir()


def is_held(files: Path) -> None:
    """By root: a job has no right to. Nobody removes it then, root included."""
    for flag, name in (("+i", "kept"), ("+a", "kept.log"), ("+i", "closed/file"), ("+i", "closed")):
        chattr(flag, files / name)
    for name in ("kept", "kept.log", "closed/file"):
        with pytest.raises(PermissionError):
            (files / name).unlink()


@dataclass(frozen=True)
class Attack:
    script: str
    took_place: Callable[[Path], None]
    """On the host: it is what it was meant to be."""


ATTACKS = {
    "links": Attack(f"ln -s {VICTIM} directory; ln -s /etc/passwd file; ln -s / root; ln -s .. up; ln -s loop loop", is_link_out),
    "depth": Attack(python("for _ in range(3000): os.mkdir('d'); os.chdir('d')"), is_too_deep),
    "modes": Attack("mkdir -p closed/in; touch closed/in/file; cp /bin/true setuid; chmod 6777 setuid; chmod 0 closed", is_closed),
    "names": Attack(
        python("for name in (b'-rf', b'\\xff\\n', b'*', b' ', b'x' * 255): os.makedirs(name + b'/' + name)"), has_strange_names
    ),
    "fifos and sockets": Attack("mkfifo fifo; " + python("socket.socket(socket.AF_UNIX).bind('socket')"), has_what_is_no_file),
    "hard links": Attack(python("open('one', 'w')\nfor number in range(500): os.link('one', str(number))"), has_links),
    "a sparse file": Attack("truncate -s 1T huge", is_sparse),
    "moved directories": Attack("mkdir -p a/b c; mv a c/; mkdir a; mv c/a/b a/; mkdir a/b/c; mv c/a a/b/", is_moved),
    "flags": Attack("mkdir closed; touch kept kept.log closed/file", is_held),
}


@pytest.fixture
def lifted(tmp_path: Path) -> Iterator[None]:
    with flags_lifted(tmp_path):
        yield


@pytest.mark.usefixtures("lifted")
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
async def test_whatever_a_job_leaves_goes_and_nothing_else(tmp_path: Path, attack: Attack) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("theirs")
    watched = ("/", "/etc/passwd", victim, victim / "file")
    before = [os.lstat(path)[:6] for path in watched]  # mode to gid
    async with open_runner(tmp_path, workspaces=True) as runner:
        await use(runner, attack.script.replace(VICTIM, str(victim)))
        attack.took_place(tmp_path / "state/workspaces/ann/build/files")
        (one,) = await runner.list_workspaces()
        assert one.size is not None and one.size < 64 << 20
        await use(runner, "true")  # the next job begins in it all the same
        with fail_after(20):
            await runner.remove_workspace("ann", "build")
        assert await runner.list_workspaces() == []
        assert list(runner.state.removed.iterdir()) == []
    assert [os.lstat(path)[:6] for path in watched] == before
    assert (victim / "file").read_text() == "theirs"


async def use(runner: JobRunner, script: str, user: str = "ann", name: str = "build") -> bytes:
    with fail_after(20):
        job = await runner.start(shell(script, workspace=name), user=user)
        data = await output(job)
        assert (await job.wait()).status == "completed", data
    return data


async def test_a_job_cannot_hold_its_files_by_flags(tmp_path: Path) -> None:
    async with open_runner(tmp_path, workspaces=True) as runner:
        data = await use(runner, "touch kept; chattr +i kept; chattr +a kept; rm kept; ls")
    assert data.count(b"Operation not permitted") == 2


async def test_a_job_that_moves_things_all_the_time_is_listed_and_keeps_its_workspace(tmp_path: Path) -> None:
    script = "mkdir -p a/b/c/d e; echo in; while :; do mv a/b e/; mv e/b a/; done"
    async with open_runner(tmp_path, workspaces=True) as runner:
        job = await runner.start(shell(script, workspace="build"), user="ann")
        async with job.log() as reader:
            await reader.next_line()
        for _ in range(20):
            assert [one.held_by for one in await runner.list_workspaces()] == [job.job_id]
            with pytest.raises(InvalidRequest, match="in use by job"):
                await runner.remove_workspace("ann", "build")
        await job.stop(grace=0)
        await runner.remove_workspace("ann", "build")


USERS = ["", ".", "..", "a/b", "%2E", "%", "ann/build", "A", "a", "\u00fc\n", "x" * 255]


async def test_no_users_name_is_anothers_or_leads_anywhere(tmp_path: Path) -> None:
    """Each finds what it has left, and nothing else."""
    async with open_runner(tmp_path, workspaces=True) as runner:
        for number, user in enumerate(USERS):
            assert await use(runner, f"cat *; echo {number} > file", user) in (b"", b"cat: '*': No such file or directory\n")
        for number, user in enumerate(USERS):
            assert await use(runner, "cat file", user) == b"%d\n" % number
        assert sorted(one.user for one in await runner.list_workspaces()) == sorted(USERS)
        for user in USERS:
            await runner.remove_workspace(user, "build")
    assert list((tmp_path / "state/workspaces").rglob("files")) == []


async def test_files_that_are_kept_belong_to_no_job(tmp_path: Path) -> None:
    async with open_runner(tmp_path, workspaces=True, job_uids=(0x72000010, 3)) as runner:
        uids = set()
        for _ in range(4):
            uids.add((await use(runner, "touch file$(id -u); id -u")).decode().strip())
            await runner.settled()
        files = list((tmp_path / "state/workspaces/ann/build/files").iterdir())
    assert uids == {str(0x72000011), str(0x72000012)}
    assert {(path.stat().st_uid, path.stat().st_gid) for path in files} == {(0x72000010, 0x72000010)}


async def test_what_a_crash_leaves_of_making_and_removing_one(tmp_path: Path) -> None:
    state = tmp_path / "state"
    half_made, half_removed = state / "workspaces/ann/build/.new", state / "removed/workspace.1"
    half_made.mkdir(parents=True)
    (half_removed / "files" / "directory").mkdir(parents=True)
    async with open_runner(tmp_path, workspaces=True) as runner:
        with fail_after(10):
            while list(runner.state.removed.iterdir()):  # noqa: ASYNC110  # it is done beside, and nobody is told
                await anyio.sleep(0.05)
        assert await use(runner, "touch file; stat -c %U .") == b"job\n"
        assert not half_made.exists()
        await runner.remove_workspace("ann", "build")
