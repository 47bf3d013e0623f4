"""A birth that hangs: on a file system whose server never answers (FUSE), as a dead NFS server's does."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner import JobSpec
from jobrunner.errors import StartFailed
from jobrunner.offers import Offers, Owner, Volume
from tests.support.runner import open_runner
from tests.support.shim import ShimJob, shim_job
from tests.support.timing import at_most, fail_after

pytestmark = pytest.mark.requires("root")

LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing is ever found: who looks, waits. Who looks after one that cannot be killed, as a thread of
    this process, cannot be killed either."""
    top = tmp_path / "dead"
    top.mkdir()
    server = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={server},rootmode=40755,user_id=0,group_id=0,allow_other".encode()
    if LIBC.mount(b"dead", bytes(top), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "cannot mount")
    try:
        yield top
    finally:
        os.close(server)  # every one that waits gets ENOTCONN
        subprocess.run(["umount", "-l", str(top)], check=True)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ShimJob]:
    with shim_job(tmp_path) as job:
        yield job


def test_a_birth_that_hangs_is_given_up_after_its_time(job: ShimJob, dead: Path) -> None:
    begun = time.monotonic()
    report = job.start("/bin/true", show=("/usr", "/bin", "/lib", "/lib64", str(dead / "shown")), birth=0.5)
    assert (report.step, report.errno) == ("init", errno.ETIMEDOUT)
    assert 0.5 <= time.monotonic() - begun < at_most(10)
    assert job.left() == []


async def test_a_start_that_hangs_fails_and_leaves_nothing(tmp_path: Path, dead: Path) -> None:
    offers = Offers(volumes={"volume": Volume(dead / "volume", owner=Owner(1, 1))}, roots={"root": dead / "root"})
    async with open_runner(tmp_path, offers=offers, start_timeout=1.0) as runner:
        for fields, step in (({"volumes": ("volume",)}, "init"), ({"root": "root"}, "root")):
            with fail_after(20), pytest.raises(StartFailed, match="timed out") as caught:
                await runner.start(JobSpec("true", **fields))
            assert (caught.value.step, caught.value.errno) == (step, errno.ETIMEDOUT)
        runner.looks.most = 1  # the one that waits still
        with pytest.raises(StartFailed, match="root: root: Connection timed out"):
            await runner.start(JobSpec("true", root="root"))
        assert (runner.running, list(runner.state.jobs.iterdir()), list(runner.state.running.iterdir())) == (0, [], [])
        assert runner.cgroups.leftovers() == []
        assert (await (await runner.start(JobSpec("true"))).wait()).status == "completed"
