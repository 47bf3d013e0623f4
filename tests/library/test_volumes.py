"""Directories, root file systems and sizes that a job asks for by name or number."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jobrunner import JobSpec, Limits
from jobrunner.config import DEFAULTS
from jobrunner.errors import InvalidRequest, StartFailed
from jobrunner.offers import Offers, Owner, Volume
from tests.support.runner import open_runner, run_output, shell

pytestmark = pytest.mark.requires("root")

OWNER = 0x6FFF0001
MIB = 1 << 20


def directory(path: Path, owner: int = OWNER) -> Path:
    path.mkdir(mode=0o700)
    os.chown(path, owner, owner)
    return path


def offering(**volumes: Volume) -> dict[str, Any]:
    return {"offers": Offers(volumes=volumes)}


async def test_a_volumes_files_are_the_jobs_inside_and_their_owners_on_disk(tmp_path: Path) -> None:
    cache = directory(tmp_path / "cache")
    async with open_runner(tmp_path, **offering(cache=Volume(cache))) as runner:
        info, data = await run_output(runner, shell("cd /volumes/cache && echo kept > file && stat -c %U file", volumes=["cache"]))
        again, seen = await run_output(runner, shell("cat /volumes/cache/file", volumes=["cache:ro"]))
    assert (info.volumes, data) == (("cache",), b"job\n")
    assert ((cache / "file").stat().st_uid, (cache / "file").stat().st_gid) == (OWNER, OWNER)
    assert (again.volumes, seen) == (("cache:ro",), b"kept\n")


async def test_a_volume_is_read_only_where_the_job_says_so(tmp_path: Path) -> None:
    cache = directory(tmp_path / "cache")
    async with open_runner(tmp_path, **offering(cache=Volume(cache))) as runner:
        info, data = await run_output(runner, shell("echo x > /volumes/cache/file", volumes=["cache:ro"]))
    assert info.exit_code != 0
    assert b"Read-only file system" in data
    assert list(cache.iterdir()) == []


async def test_a_job_does_not_see_the_volumes_that_it_did_not_ask_for(tmp_path: Path) -> None:
    offers = offering(one=Volume(directory(tmp_path / "one")), two=Volume(directory(tmp_path / "two")))
    async with open_runner(tmp_path, **offers) as runner:
        _, data = await run_output(runner, shell("ls /volumes", volumes=["one"]))
        _, none = await run_output(runner, shell(f"ls /volumes {tmp_path}"))
    assert data == b"one\n"
    assert none.count(b"No such file or directory") == 2


@pytest.mark.parametrize(
    ("spec", "field", "reason"),
    [
        (JobSpec("true", volumes=("nosuch",)), "volumes", "'nosuch' is not in this server's configuration; there are: sources"),
        (JobSpec("true", volumes=("sources",)), "volumes", "'sources' is read-only: ask for sources:ro"),
        (JobSpec("true", root="alpine"), "root", "'alpine' is not in this server's configuration; there are: none"),
    ],
)
async def test_what_is_not_offered_is_refused_with_what_there_is(tmp_path: Path, spec: JobSpec, field: str, reason: str) -> None:
    async with open_runner(tmp_path, **offering(sources=Volume(tmp_path / "sources", read_only=True))) as runner:
        with pytest.raises(InvalidRequest) as caught:
            await runner.start(spec)
        assert runner.running == 0
    assert (caught.value.field, caught.value.reason) == (field, reason)


async def test_no_job_writes_as_root(tmp_path: Path) -> None:
    volume = directory(tmp_path / "roots", owner=0)
    (volume / "public").write_text("public\n")
    (volume / "secret").write_text("secret\n")
    (volume / "secret").chmod(0o600)
    volume.chmod(0o755)
    async with open_runner(tmp_path, **offering(roots=Volume(volume))) as runner:
        with pytest.raises(StartFailed, match='volume: roots: its directory is root\'s.*owner = "UID:GID"') as caught:
            await runner.start(JobSpec("true", volumes=("roots",)))
        assert runner.running == 0
        _, data = await run_output(runner, shell("cat /volumes/roots/* 2>/dev/null", volumes=["roots:ro"]))
    assert caught.value.step == "volume"
    assert data == b"public\n"


async def test_another_owner_than_the_directorys_can_be_configured(tmp_path: Path) -> None:
    cache = directory(tmp_path / "cache")
    async with open_runner(tmp_path, **offering(cache=Volume(cache, owner=Owner(OWNER + 1, OWNER + 1)))) as runner:
        info, _ = await run_output(runner, shell("touch /volumes/cache/file", volumes=["cache"]))
        os.chown(cache, OWNER + 1, OWNER + 1)
        allowed, _ = await run_output(runner, shell("touch /volumes/cache/file", volumes=["cache"]))
    assert (info.status, allowed.status) == ("failed", "completed")


async def test_a_volume_that_is_not_there_fails_the_start(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **offering(cache=Volume(tmp_path / "nosuch"))) as runner:
        with pytest.raises(StartFailed, match="volume: cache: No such file or directory"):
            await runner.start(JobSpec("true", volumes=("cache",)))
        assert runner.running == 0


async def test_a_file_system_that_cannot_map_ids_fails_the_start_with_the_remedy(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **offering(proc=Volume(Path("/proc"), owner=Owner(OWNER, OWNER)))) as runner:
        with pytest.raises(StartFailed, match='owner = "keep"') as caught:
            await runner.start(JobSpec("true", volumes=("proc",)))
    assert (caught.value.step, caught.value.errno) == ("idmap", errno.EINVAL)


async def test_git_clones_from_a_volume_and_what_it_cloned_is_built(tmp_path: Path) -> None:
    sources = directory(tmp_path / "sources")
    (sources / "hello.c").write_text('#include <stdio.h>\nint main(void) { puts("built"); return 0; }\n')
    script = "chown 0:0 . && git init -q . && git add . && git -c user.name=t -c user.email=t@t commit -qm one && chown -R $0:$0 ."
    subprocess.run(["sh", "-c", script, str(OWNER)], cwd=sources, check=True)  # noqa: ASYNC221
    offers = offering(sources=Volume(sources, read_only=True))
    build = "git clone -q /volumes/sources . && cc -o hello hello.c && ./hello"
    async with open_runner(tmp_path, **offers) as runner:
        info, data = await run_output(runner, shell(build, volumes=["sources:ro"]))
    assert (info.status, data) == ("completed", b"built\n")


async def test_a_named_root_is_all_that_the_job_sees(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    program = 'int puts(const char *); int access(const char *, int); int main(void) { puts(access("/usr", 0) ? "alone" : "not"); }'
    subprocess.run(["cc", "-static", "-x", "c", "-o", root / "bin" / "look", "-"], input=program.encode(), check=True)  # noqa: ASYNC221
    async with open_runner(tmp_path, offers=Offers(roots={"small": root})) as runner:
        info, data = await run_output(runner, JobSpec("look", root="small"))
    assert (info.root, data) == ("small", b"alone\n")


async def test_tmp_and_work_have_the_sizes_that_were_asked_for(tmp_path: Path) -> None:
    script = "for d in /tmp /dev/shm /work; do head -c 3M /dev/zero > $d/x 2>/dev/null; stat -c %s $d/x; done"
    async with open_runner(tmp_path) as runner:
        info, data = await run_output(runner, shell(script, limits=Limits(tmp_size=MIB, work_size=2 * MIB)))
    assert [int(word) for word in data.split()] == [MIB, MIB, 2 * MIB]
    assert (info.limits.tmp_size, info.limits.work_size) == (MIB, 2 * MIB)


async def test_tmp_has_the_default_size_and_a_ceiling(tmp_path: Path) -> None:
    async with open_runner(tmp_path, ceilings=Limits(tmp_size=512 * MIB)) as runner:
        _, data = await run_output(runner, shell("df -B1 --output=size /tmp | tail -1"))
        with pytest.raises(InvalidRequest, match="limits.tmp_size"):
            await runner.start(JobSpec("true", limits=Limits(tmp_size=513 * MIB)))
    assert int(data) == DEFAULTS.tmp_size
