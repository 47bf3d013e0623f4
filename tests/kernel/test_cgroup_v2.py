"""The v2 layout on a real v2 tree; on a hybrid host it has no controllers, so that limits must be refused by name."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from jobrunner.job import Limits
from jobrunner.linux.cgroup_v2 import CgroupV2Host
from jobrunner.linux.disk import Disk
from jobrunner.linux.kernfs import LimitNotApplied
from jobrunner.linux.mountinfo import cgroup_mounts, own_cgroups
from tests.support.cgroups import JOB, directories
from tests.support.shim import wait_until
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root", "cgroup2", "cgroup1:memory")


@pytest.fixture
def host() -> Iterator[CgroupV2Host]:
    name = f"jobrunner-test-{secrets.token_hex(4)}"
    tree = CgroupV2Host(cgroup_mounts()[""], own_cgroups()[""], "", name)
    yield tree
    left = tree.leftovers()
    for job_id in left:
        tree.reopen(job_id, {}).remove()
    tree.close()
    assert left == []
    assert directories(name) == []


async def test_the_shim_and_the_job_have_directories_of_their_own(host: CgroupV2Host) -> None:
    cgroup = host.create(JOB, Limits())
    items = dict(item for item in cgroup.launch_items() if item[0] != "counter")
    assert [Path(items[key]).is_dir() for key in ("cgroup2-shim", "cgroup2-job")] == [True, True]
    assert Path(items["cgroup2-job"]).parent == Path(items["cgroup2-shim"]).parent == Path(cgroup.paths["unified"])
    assert host.leftovers() == [JOB]
    assert host.reopen(JOB, cgroup.paths).launch_items() == cgroup.launch_items()
    assert cgroup.remove()


def test_kill_and_cpu_time(host: CgroupV2Host) -> None:
    cgroup = host.create(JOB, Limits())
    procs = f"{dict(cgroup.launch_items())['cgroup2-job']}/cgroup.procs"
    with subprocess.Popen(
        ["/bin/sh", "-c", f"echo 0 > {procs}; echo up; while :; do :; done"],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        wait_until(lambda: (cgroup.usage().cpu_user or 0) > 0.005)  # its first ticks may all fall on the kernel's time
        cgroup.kill()
        process.wait(at_most(10))
    assert anyio.run(cgroup.removed)


@pytest.mark.parametrize("limit", ["cpus", "memory", "pids", "write_iops"])
async def test_a_controller_that_is_not_there_fails_its_limit_by_name(host: CgroupV2Host, limit: str) -> None:
    wanted: dict[str, Any] = {limit: 2_000_000 if limit == "memory" else 4}
    limits = Limits(**wanted)
    with pytest.raises(LimitNotApplied, match=f"cannot apply limit {limit}: the .* controller is not there"):
        host.create(JOB, limits, [Disk("254:0", "/")])
    assert host.leftovers() == []
    cgroup = host.create(JOB, limits, [Disk("254:0", "/")], allow_missing=[limit])
    assert len(cgroup.missing) == 1
    assert cgroup.remove()
