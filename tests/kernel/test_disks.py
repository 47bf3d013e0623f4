"""Real file systems on real block devices: which whole disks are under a path, and that limits hold there."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from jobrunner import JobInfo, Limits, Stream
from jobrunner.errors import HostError
from jobrunner.linux.disk import disks_under
from jobrunner.offers import Offers, Volume
from jobrunner.runner import JobRunner
from tests.support.cgroups import JOB, own_tree
from tests.support.disks import KINDS, Place, mounted
from tests.support.runner import open_runner, run, run_output, shell
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root", "command:mkfs.btrfs", "command:mkfs.xfs")

MIB = 1 << 20
OWNER = 0x6FFF0001
SIZE, COUNT = 3 * MIB, 9
FREE = Limits(read_bps=1 << 40, write_bps=1 << 40)
HELD = 0.5
"""Seconds that each copy takes at least: 0.75 s and 0.9 s by its rate, less what the kernel lets through at once."""
COPY = "dd if=/dev/zero of=file bs={block} count={count} oflag=direct && dd if=file of=/dev/null bs={block} iflag=direct"
BY_BYTES = f"{COPY.format(block='256k', count=SIZE >> 18)} && dd if=/dev/zero of=file bs=256k count={SIZE >> 18} conv=fsync"
BY_OPERATIONS = COPY.format(block="4k", count=COUNT)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with KINDS[request.param](tmp_path) as found:
        yield found


def every(*, but: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    there = {"logical volume", "multipath", "subvolume"}  # in the virtual machine: the device mapper, and more time
    marks = dict.fromkeys(there, pytest.mark.generation("v2"))
    kinds = [pytest.param(kind, marks=marks.get(kind, ())) for kind in KINDS if kind not in but]
    return pytest.mark.parametrize("place", kinds, indirect=True, ids=str)


async def copies(runner: JobRunner, script: str, limits: Limits, **spec: Any) -> tuple[JobInfo, list[float]]:
    """A job, and the seconds of each of its copies by dd(1)'s own word."""
    info, data = await run_output(runner, shell(f"export LC_ALL=C; exec 2>&1; {script} && rm file", limits=limits, **spec))
    assert info.exit_code == 0, data
    return info, [float(seconds) for seconds in re.findall(r"copied, ([\d.e+-]+) s", data.decode())]


async def until_free(runner: JobRunner, script: str, **spec: Any) -> None:
    """The same copies without a limit take half of the time at most, unless this host is busy at the moment."""
    with fail_after(30):
        while max((await copies(runner, script, FREE, **spec))[1]) > HELD / 2:
            pass


@every()
async def test_limits_hold_whatever_is_between_a_job_and_the_disk(place: Place) -> None:
    assert {disk.device for disk in disks_under([place.path])} == place.disks
    rate = int(4 * MIB * place.share)  # of each disk
    held: dict[str, tuple[JobInfo, list[float]]] = {}

    async def hold(name: str, script: str, limits: Limits) -> None:
        held[name] = await copies(runner, script, limits)

    async with open_runner(place.path) as runner:
        async with anyio.create_task_group() as jobs:
            jobs.start_soon(hold, "bytes", BY_BYTES, replace(FREE, read_bps=rate, write_bps=rate))
            jobs.start_soon(hold, "operations", BY_OPERATIONS, replace(FREE, read_iops=10, write_iops=10))
        await until_free(runner, f"{BY_BYTES} && {BY_OPERATIONS}")
    assert (len(held["bytes"][1]), len(held["operations"][1])) == (3, 2)
    assert min(seconds for _, found in held.values() for seconds in found) > HELD
    usage = held["bytes"][0].usage
    # Once, not twice; below a device of the mapper a loop device syncs its file on the host's disk in the job's name.
    assert usage.write_bytes is not None and 2 * SIZE <= usage.write_bytes < 4 * SIZE
    assert usage.read_bytes is not None and SIZE <= usage.read_bytes < 1.5 * SIZE


@pytest.mark.generation("v2")
@every(but=("partition", "subvolume", "btrfs on two disks"))
async def test_what_the_kernel_writes_back_for_a_job_is_held_to_its_rate(place: Place) -> None:
    """By a flusher of the kernel's, asked by somebody else: cgroup v1 takes it for nobody's, and tells so."""
    script = f"dd if=/dev/zero of=file bs=256k count={SIZE >> 18} && echo written && exec sleep 600"
    async with open_runner(place.path) as runner:
        job = await runner.start(shell(script, limits=replace(FREE, write_bps=4 * MIB)))
        async with job.log(streams=frozenset({Stream.STDOUT})) as reader:
            await reader.next_line()
        begun = time.monotonic()
        await anyio.run_process(["sync", "--file-system", place.path])
        took = time.monotonic() - begun
        info = await job.stop(grace=0)
    assert took > HELD
    assert info.missing == ()
    assert info.usage.write_bytes is not None and info.usage.write_bytes >= SIZE


@pytest.mark.parametrize("place", ["xfs"], indirect=True)
async def test_the_disk_of_a_volume_is_limited_too(place: Place, tmp_path: Path) -> None:
    os.chown(place.path, OWNER, OWNER)
    script = f"cd /volumes/data && {BY_BYTES}"
    async with open_runner(tmp_path, offers=Offers(volumes={"data": Volume(place.path)})) as runner:
        _, seconds = await copies(runner, script, replace(FREE, read_bps=4 * MIB, write_bps=4 * MIB), volumes=["data"])
        await until_free(runner, script, volumes=["data"])
    assert len(seconds) == 3 and min(seconds) > HELD


@pytest.mark.parametrize("place", ["btrfs"], indirect=True)
def test_a_subvolume_that_is_not_mounted_is_on_the_disk_of_its_btrfs(place: Place) -> None:
    subprocess.run(["btrfs", "subvolume", "create", place.path / "sub"], check=True, capture_output=True)
    assert (place.path / "sub").stat().st_dev != place.path.stat().st_dev
    assert {disk.device for disk in disks_under([place.path / "sub"])} == place.disks


async def test_a_limit_where_there_is_only_memory_is_refused_with_the_reason(tmp_path: Path) -> None:
    with mounted(tmp_path / "memory", "-t", "tmpfs", "tmpfs") as where, own_tree() as host:
        disks = disks_under([where])
        with pytest.raises(HostError, match=f"cannot apply limit write_bps: {where} is on tmpfs, which is memory"):
            host.create(JOB, Limits(write_bps=MIB), disks, explicit=["write_bps"])


async def test_a_volume_that_has_no_disk_here_is_told(tmp_path: Path) -> None:
    with mounted(tmp_path / "remote", "-t", "hugetlbfs", "hugetlbfs") as where:  # neither a disk's nor memory of the job's
        os.chown(where, OWNER, OWNER)
        volumes = {"data": Volume(where, keep_owners=True)}
        async with open_runner(tmp_path, offers=Offers(volumes=volumes)) as runner:
            with_it = await run(runner, shell("true", volumes=["data"]))
            without = await run(runner, shell("true"))
    told = f"disk I/O: not limited where {where} is on hugetlbfs, which has no disk here"
    assert (told in with_it.missing, told in without.missing) == (True, False)
