"""Volumes under attack: by what jobs leave in them for others, and by what becomes of their directories meanwhile."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobrunner import JobSpec
from jobrunner.config import RunnerConfig
from jobrunner.errors import ConfigError, StartFailed
from jobrunner.offers import Offers, Volume
from tests.support.runner import open_runner, output, run_output, shell
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

OWNER = 0x6FFF0001


def directory(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True)
    os.chown(path, OWNER, OWNER)
    return path


def offering(**volumes: Path) -> dict[str, Any]:
    return {"offers": Offers(volumes={name: Volume(path) for name, path in volumes.items()})}


BELOW: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "volumes: inner": lambda path, fixed: {"offers": Offers(volumes={"outer": Volume(path, fixed), "inner": Volume(path / "a/b")})},
    "roots: inner": lambda path, fixed: {"offers": Offers(volumes={"outer": Volume(path, fixed)}, roots={"inner": path / "a/b"})},
    "show": lambda path, fixed: {"offers": Offers(volumes={"outer": Volume(path, fixed)}), "show": (f"{path}/a/../a/b",)},
}


@pytest.mark.parametrize("what", BELOW)
def test_nothing_is_offered_below_what_jobs_write_to(tmp_path: Path, what: str) -> None:
    with pytest.raises(ConfigError, match=f"{what}: {tmp_path}/volume.* is below volume outer, which jobs write to"):
        RunnerConfig(state_dir=tmp_path / "state", **BELOW[what](tmp_path / "volume", False))
    RunnerConfig(state_dir=tmp_path / "state", **BELOW[what](tmp_path / "volume", True))


@pytest.mark.parametrize("path", ["state", "state/jobs", "."])
def test_the_state_directory_is_in_no_volume_and_none_in_it(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="volumes: mine: the state directory"):
        RunnerConfig(state_dir=tmp_path / "state", offers=Offers(volumes={"mine": Volume(tmp_path / path, read_only=True)}))


@pytest.mark.parametrize("place", ["inner", "inner/below"])
async def test_a_link_that_a_job_has_put_on_the_way_is_not_followed(tmp_path: Path, place: str) -> None:
    """The configuration that refuses this was another one when the job ran."""
    outer, secret = directory(tmp_path / "outer"), directory(tmp_path / "secret")
    directory(outer / "inner" / "below")
    os.chown(outer / "inner", OWNER, OWNER)
    (directory(secret / "below") / "file").write_text("secret")
    (secret / "file").write_text("secret")
    async with open_runner(tmp_path, **offering(outer=outer)) as runner:
        swap = f"cd /volumes/outer && mv inner away && ln -s {secret} inner"
        info, _ = await run_output(runner, shell(swap, volumes=["outer"]))
    assert info.status == "completed"
    assert (outer / place / "file").read_text() == "secret"
    async with open_runner(tmp_path, **offering(inner=outer / place)) as runner:
        for ask in ("inner", "inner:ro"):
            with pytest.raises(StartFailed, match="symbolic link; \\[volumes\\] has to name where that leads") as caught:
                await runner.start(shell("cat /volumes/inner/file", volumes=[ask]))
            assert (caught.value.step, caught.value.errno) == ("volume", errno.ELOOP)


@pytest.mark.parametrize("place", ["root", "root/below"])
async def test_no_root_is_behind_a_link(tmp_path: Path, place: str) -> None:
    """It may lead through what jobs write to, which the configuration does not say."""
    directory(tmp_path / "cache" / "below")
    (tmp_path / "root").symlink_to(tmp_path / "cache")
    async with open_runner(tmp_path, offers=Offers(roots={"one": tmp_path / place})) as runner:
        with pytest.raises(StartFailed, match="root: one: .* symbolic link; \\[roots\\] has to name where that leads"):
            await runner.start(JobSpec("true", root="one"))
        assert runner.running == 0


async def test_no_file_is_in_two_volumes(tmp_path: Path) -> None:
    one, two = directory(tmp_path / "one"), directory(tmp_path / "two")
    script = "cd /volumes; echo x > one/file; ln one/file one/again && ln one/file two/file"
    async with open_runner(tmp_path, **offering(one=one, two=two)) as runner:
        info, data = await run_output(runner, shell(script, volumes=["one", "two"]))
    assert (info.exit_code, b"Invalid cross-device link" in data) == (1, True)
    assert ((one / "file").stat().st_nlink, list(two.iterdir())) == (2, [])
    os.link(one / "file", two / "file")  # it is the mounts that keep them apart, and not the file system


async def test_devices_and_setuid_programs_of_a_volume_are_plain_files(tmp_path: Path) -> None:
    cache = directory(tmp_path / "cache")
    os.mknod(cache / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (cache / "zero").chmod(0o666)
    with (cache / "zero").open("rb") as zero:
        assert zero.read(1) == b"\0"
    (cache / "id").write_bytes(Path("/usr/bin/id").read_bytes())
    (cache / "id").chmod(0o4755)  # root's
    script = "exec 2>&1; cd /volumes/cache; head -c1 zero; ./id -u; mknod another c 1 5; id -u"
    async with open_runner(tmp_path, **offering(cache=cache)) as runner:
        _, data = await run_output(runner, shell(script, volumes=["cache"]))
    lines = data.decode().splitlines()
    assert "Permission denied" in lines[0] and "Operation not permitted" in lines[2]
    assert lines[1] == lines[3] != "0"


async def test_fifos_and_sockets_of_a_volume_hold_nobody_up(tmp_path: Path) -> None:
    cache = directory(tmp_path / "cache")
    script = "cd /volumes/cache; mkfifo fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"socket\")'"
    async with open_runner(tmp_path, **offering(cache=cache)) as runner:
        info, _ = await run_output(runner, shell(script, volumes=["cache"]))
        again, data = await run_output(runner, shell("ls /volumes/cache", volumes=["cache:ro"]))
    assert (info.status, again.status, data) == ("completed", "completed", b"fifo\nsocket\n")


def make_file(path: Path) -> None:
    path.write_text("")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))


@pytest.mark.parametrize("make", [make_file, os.mkfifo, make_socket, make_device])
@pytest.mark.parametrize("ask", ["cache", "cache:ro"])
async def test_what_is_no_directory_is_no_volume(tmp_path: Path, make: Callable[[Path], None], ask: str) -> None:
    make(tmp_path / "it")
    os.chown(tmp_path / "it", OWNER, OWNER)
    with fail_after(20):
        async with open_runner(tmp_path, **offering(cache=tmp_path / "it")) as runner:
            with pytest.raises(StartFailed, match="volume: cache: Not a directory"):
                await runner.start(JobSpec("true", volumes=(ask,)))
            assert runner.running == 0


async def test_a_volume_that_vanishes_and_comes_back_while_jobs_run(tmp_path: Path) -> None:
    cache = directory(tmp_path / "cache")
    spec = shell("ls /volumes/cache", volumes=["cache"])
    async with open_runner(tmp_path, **offering(cache=cache)) as runner:
        script = "cd /volumes/cache; echo in; until [ -e go ]; do sleep 0.05; done; touch left; ls -A"
        job = await runner.start(shell(script, volumes=["cache"]))
        async with job.log() as reader:
            await reader.next_line()
        cache.rename(tmp_path / "away")
        with pytest.raises(StartFailed, match="volume: cache: No such file or directory"):
            await runner.start(spec)
        (directory(cache) / "new").touch()
        assert (await run_output(runner, spec))[1] == b"new\n"
        (tmp_path / "away" / "go").touch()  # it has the directory that it was given
        assert (await output(job)).endswith(b"go\nleft\n")
        (cache / "new").unlink()
        cache.rmdir()
        cache.symlink_to(tmp_path / "away")
        with pytest.raises(StartFailed, match="symbolic link"):
            await runner.start(spec)
        assert runner.running == 0
