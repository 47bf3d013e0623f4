"""The life of a cgroup: made with its limits or not at all, found again, swept, removed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from jobrunner.errors import HostError
from jobrunner.job import Limits
from jobrunner.linux.cgroup import CgroupHost
from jobrunner.linux.cgroup_v1 import CgroupV1, CgroupV1Host
from jobrunner.linux.disk import Disk
from jobrunner.linux.kernfs import LimitNotApplied
from jobrunner.linux.mountinfo import cgroup_mounts, own_cgroups
from tests.support.cgroups import JOB, directories, own_tree, start
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root", "cgroup1:memory")

NO_DISK = Disk("", "/state", "/state is on tmpfs, which is memory", memory=True)


@pytest.fixture
def host() -> Iterator[CgroupHost]:
    with own_tree() as tree:
        yield tree


def wait_for_exit(process: subprocess.Popen[bytes]) -> int:
    process.communicate(timeout=10)
    return process.returncode


async def test_one_directory_in_every_hierarchy_and_none_afterwards(host: CgroupHost) -> None:
    cgroup = host.create(JOB, Limits(cpus=1, memory=1 << 30, pids=512))
    assert sorted(map(str, directories(JOB))) == sorted(cgroup.paths.values())
    assert cgroup.remove()
    assert directories(JOB) == []


async def test_the_limits_are_in_the_kernel_as_asked(host: CgroupHost) -> None:
    cgroup = host.create(JOB, Limits(cpus=1.5, memory=(64 << 20) + 100, pids=77))
    files = {
        "cpu": {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"},
        "memory": {"memory.limit_in_bytes": str(64 << 20), "memory.memsw.limit_in_bytes": str(64 << 20)},
        "pids": {"pids.max": "77"},
    }
    for controller, values in files.items():
        for file, value in values.items():
            assert Path(cgroup.paths[controller], file).read_text().strip() == value
    # To be read there, and with a burst, so that it never holds the job back before the limit above it does.
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.cfs_burst_us")
    assert [Path(cgroup.paths["cpu"], "job", name).read_text().strip() for name in names] == ["150000", "100000", "150000"]
    assert cgroup.remove()


async def test_a_limit_above_the_servers_own_is_kept_by_the_servers_own() -> None:
    mounts, own = cgroup_mounts(), own_cgroups()
    parent = Path(mounts["cpu"].directory(own["cpu"])) / "jobrunner-test-parent"
    parent.mkdir()
    try:
        (parent / "cpu.cfs_quota_us").write_text("50000")
        tight = CgroupV1Host(mounts, own | {"cpu": f"{own['cpu'].rstrip('/')}/{parent.name}"}, "", "jobrunner-test-below")
        cgroup = tight.create(JOB, Limits(cpus=1))
        assert Path(cgroup.paths["cpu"], "cpu.cfs_quota_us").read_text().strip() == "-1"
        assert cgroup.remove()
        within = tight.create(JOB, Limits(cpus=0.4))
        assert Path(within.paths["cpu"], "cpu.cfs_quota_us").read_text().strip() == "40000"
        assert within.remove()
        tight.close()
    finally:
        parent.rmdir()


async def test_what_the_job_record_keeps_is_enough_to_find_it_again(host: CgroupHost) -> None:
    made = host.create(JOB, Limits(pids=9))
    found = host.reopen(JOB, json.loads(json.dumps(dict(made.paths))))
    more = set(found.launch_items()) - set(made.launch_items())
    assert set(made.launch_items()) <= set(found.launch_items())
    assert {name for name, _ in more} == {"io-limit"}  # which of them there are is not recorded: a kill lifts all
    assert host.reopen(JOB, {}).paths == made.paths
    assert host.leftovers() == [JOB]
    assert found.remove()
    assert host.leftovers() == []


async def test_a_second_one_of_the_same_id_is_refused_and_the_first_stays(host: CgroupHost) -> None:
    cgroup = host.create(JOB, Limits(pids=9))
    with pytest.raises(HostError, match="File exists"):
        host.create(JOB, Limits(pids=10))
    assert Path(cgroup.paths["pids"], "pids.max").read_text() == "9\n"
    assert cgroup.remove()


async def test_the_base_is_made_again_when_it_is_gone(host: CgroupHost) -> None:
    host.close()
    assert host.create(JOB, Limits(pids=9)).remove()


@pytest.mark.parametrize("explicit", [("write_bps",), ()])
async def test_a_disk_limit_without_a_disk_fails_only_if_the_caller_asked_for_it(
    host: CgroupHost, explicit: tuple[str, ...]
) -> None:
    limits = Limits(pids=9, write_bps=1000)
    if explicit:
        with pytest.raises(LimitNotApplied, match="cannot apply limit write_bps: /state is on tmpfs, which is memory"):
            host.create(JOB, limits, [NO_DISK], explicit=explicit)
        assert directories(JOB) == []
        return
    cgroup = host.create(JOB, limits, [NO_DISK])
    assert cgroup.missing == ("write_bps: not limited: /state is on tmpfs, which is memory",)
    assert cgroup.remove()


async def test_a_limit_that_the_kernel_refuses_fails_naming_it_and_leaves_nothing(host: CgroupHost) -> None:
    with pytest.raises(LimitNotApplied, match=r"cannot apply limit read_iops: .*250:999 7.*No such device"):
        host.create(JOB, Limits(read_iops=7), [Disk("250:999", "/state")])
    assert directories(JOB) == []


async def test_a_limit_that_may_be_missing_is_told(host: CgroupHost) -> None:
    cgroup = host.create(JOB, Limits(read_iops=7), [Disk("250:999", "/state")], allow_missing=["read_iops"])
    assert len(cgroup.missing) == 1
    assert cgroup.missing[0].startswith("read_iops: not limited: ")
    assert cgroup.remove()


async def test_a_controller_that_is_not_mounted_fails_its_limit_by_name() -> None:
    mounts = {name: mount for name, mount in cgroup_mounts().items() if name in ("memory", "cpu")}
    bare = CgroupV1Host(mounts, own_cgroups(), "", "jobrunner-test-bare")
    try:
        assert bare.version == "v1"
        with pytest.raises(LimitNotApplied, match="cannot apply limit pids: no pids cgroup controller is mounted"):
            bare.create(JOB, Limits(pids=9))
        assert directories(JOB) == []
    finally:
        bare.close()


@pytest.mark.parametrize("unified", [True, False], ids=["cgroup.kill", "pidfds"])
async def test_kill_takes_every_process_and_then_it_can_be_removed(host: CgroupHost, unified: bool) -> None:
    made = host.create(JOB, Limits(pids=64))
    paths = {name: path for name, path in made.paths.items() if unified or name != "unified"}
    cgroup = host.reopen(JOB, paths)
    loop = start(cgroup, ["/bin/sh", "-c", "setsid sleep 600 & (trap '' TERM; while :; do sleep 0.01; done) & echo up; wait"])
    assert loop.stdout is not None
    assert loop.stdout.readline() == b"up\n"
    cgroup.kill()
    assert await anyio.to_thread.run_sync(wait_for_exit, loop) == -signal.SIGKILL
    assert await cgroup.removed()
    assert host.reopen(JOB, {}).remove()


async def test_kill_wins_against_a_fork_bomb(host: CgroupHost) -> None:
    made = host.create(JOB, Limits(pids=64, cpus=0.5))
    cgroup = host.reopen(JOB, {name: path for name, path in made.paths.items() if name != "unified"})
    bomb = start(cgroup, ["/bin/sh", "-c", "b() { b & b & }; echo up; b; sleep 600"])
    assert bomb.stdout is not None
    assert bomb.stdout.readline() == b"up\n"
    cgroup.kill()
    bomb.wait(10)
    bomb.communicate()
    assert await cgroup.removed()
    assert made.remove()


async def test_removed_says_when_a_process_is_still_there(host: CgroupHost) -> None:
    cgroup = host.create(JOB, Limits(pids=64))
    sleeper = start(cgroup, ["/bin/sh", "-c", "echo up; exec sleep 600"])
    assert sleeper.stdout is not None
    sleeper.stdout.readline()
    began = time.monotonic()
    assert not await cgroup.removed(timeout=0.2)
    assert 0.2 <= time.monotonic() - began < at_most(5)
    # The hierarchies that it could remove are gone; the kill finds the process in those that it could not.
    sleeper.kill()
    sleeper.communicate()
    assert await cgroup.removed()


def test_controllers_of_one_hierarchy_share_a_directory() -> None:
    cgroup = CgroupV1({"cpu": Path("/c/x"), "cpuacct": Path("/c/x"), "pids": Path("/p/x")}, ())
    tasks = [item for item in cgroup.launch_items() if item[0].startswith("cgroup1")]
    assert tasks == [("cgroup1-shim", "/c/x/shim/tasks"), ("cgroup1-job", "/c/x/job/tasks"), ("cgroup1-job", "/p/x/tasks")]


async def test_a_tree_that_cannot_be_written_to_is_told_with_the_remedy(tmp_path: Path) -> None:
    mounts = {"memory": type(cgroup_mounts()["memory"])("/proc", "/")}
    with pytest.raises(HostError, match="cannot make cgroup /proc/jobrunner-test-ro/jobs"):
        CgroupV1Host(mounts, {}, "", "jobrunner-test-ro")
