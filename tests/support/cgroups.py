"""A cgroup tree of a test's own, and processes inside it, without the shim."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jobrunner.linux.cgroup import detect
from jobrunner.linux.mountinfo import cgroup_mounts
from tests.support.timing import at_most

if TYPE_CHECKING:
    from jobrunner.linux.cgroup import CgroupHost, JobCgroup

JOB = secrets.token_hex(6)
ENTER = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 99; shift; done; shift; exec "$@"'


@contextmanager
def own_tree() -> Iterator[CgroupHost]:
    """A host with a BASE that nobody else has, which is gone afterwards. Fails if the test has left anything in it."""
    name = f"jobrunner-test-{secrets.token_hex(4)}"
    host = detect("", name)
    try:
        yield host
    finally:
        left = host.leftovers()
        for job_id in left:
            cgroup = host.reopen(job_id, {})
            cgroup.kill()
            cgroup.remove()
        host.close()
    assert left == []
    assert directories(name) == []


def directories(name: str) -> list[Path]:
    """All directories of this name in all cgroup hierarchies."""
    points = {mount.point for mount in cgroup_mounts().values()}
    return [Path(found, name) for point in points for found, names, _ in os.walk(point) if name in names]


def member_directories(cgroup: JobCgroup) -> list[Path]:
    """Where the job's own processes are: a directory in each hierarchy."""
    items = cgroup.launch_items()
    return [Path(value).parent for key, value in items if key == "cgroup1-job"] + [
        Path(value) for key, value in items if key == "cgroup2-job"
    ]


def limits_in_kernel(cgroup: JobCgroup) -> dict[str, float]:
    """What the kernel's files say of a job's limits, those of disks by the first of them."""
    paths = {name: Path(path) for name, path in cgroup.paths.items()}
    if "cpu" not in paths:
        top, job = paths["unified"], paths["unified"] / "job"
        quota, period = map(int, (top / "cpu.max").read_text().split())
        disk = dict(word.split("=") for word in (job / "io.max").read_text().splitlines()[0].split()[1:])
        rates = {"read_bps": disk["rbps"], "write_bps": disk["wbps"], "read_iops": disk["riops"], "write_iops": disk["wiops"]}
        memory, pids = job / "memory.max", job / "pids.max"
    else:
        quota, period = (int((paths["cpu"] / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        names = ("read_bps", "write_bps", "read_iops", "write_iops")
        rates = {name: (paths["blkio"] / f"blkio.throttle.{name}_device").read_text().split()[1] for name in names}
        memory, pids = paths["memory"] / "memory.limit_in_bytes", paths["pids"] / "pids.max"
    found = {"cpus": quota / period, "memory": int(memory.read_text()), "pids": int(pids.read_text())}
    return found | {name: int(rate) for name, rate in rates.items()}


def lower_cpus(cgroup: JobCgroup, cpus: float) -> None:
    """Less CPU time than the job was started with: a job's births take some too."""
    paths = cgroup.paths
    top, quota, burst = Path(paths.get("cpu") or paths["unified"]), "cpu.max", "cpu.max.burst"
    if "cpu" in paths:
        quota, burst = "cpu.cfs_quota_us", "cpu.cfs_burst_us"
    for place in (top / "job", top):
        (place / burst).write_text("0")  # no burst is more than its quota
        (place / quota).write_text(str(round(cpus * 100_000)))


def start(cgroup: JobCgroup, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """A child that enters the job's cgroups by itself, as init does, and then is this command."""
    entries = [value for key, value in cgroup.launch_items() if key == "cgroup1-job"]
    entries += [f"{value}/cgroup.procs" for key, value in cgroup.launch_items() if key == "cgroup2-job"]
    command = ["/bin/sh", "-c", ENTER, "sh", *entries, "--", *argv]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(cgroup: JobCgroup, argv: Sequence[str], timeout: float = at_most(20)) -> subprocess.CompletedProcess[bytes]:
    """The same, to its end."""
    with start(cgroup, argv) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)
