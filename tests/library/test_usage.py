"""What a job uses, told while it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import anyio
import pytest

from jobrunner import JobSpec, Limits
from tests.support.cgroups import member_directories
from tests.support.runner import open_runner
from tests.support.timing import at_most, fail_after

pytestmark = pytest.mark.requires("root", "cgroup:memory", "cgroup:cpu", "cgroup:pids")

MIB = 1 << 20
# 32 MiB of memory, a child beside it, and more CPU time than a fifth of a processor gives in a moment.
BUSY = """
import subprocess
held = bytearray(32 << 20)
child = subprocess.Popen(["sleep", "100"])
print("busy", flush=True)
while True:
    pass
"""


async def test_a_running_job_tells_what_it_uses_now_and_what_it_has_used_most(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("python3", ("-c", BUSY), limits=Limits(cpus=0.2, memory=256 * MIB, pids=32)))
        async with job.log() as reader:
            await reader.next_line()
        with fail_after(20):
            # The kernel samples at its ticks who runs: a program's first ones may all fall on what it asks of the kernel.
            while not ((usage := job.info().usage).throttled and usage.cpu_user):  # noqa: ASYNC110  # counters tell nobody
                await anyio.sleep(0.01)
        assert job.cgroup is not None
        peak_is_told = any((place / "pids.peak").exists() for place in member_directories(job.cgroup))  # Linux 6.1 does not
        await job.stop(grace=0)
        ended = job.info().usage
    assert usage.memory is not None and usage.memory >= 32 * MIB
    assert usage.memory_peak is not None and usage.memory <= usage.memory_peak <= 256 * MIB
    assert usage.pids == 3  # init, the command and its child
    if peak_is_told:
        assert usage.pids_peak is not None and 3 <= usage.pids_peak <= 32
    assert usage.cpu_system is not None
    assert usage.oom_kills == 0
    assert None not in (usage.read_bytes, usage.write_bytes, usage.read_ops, usage.write_ops)
    assert (ended.memory, ended.pids) == (None, None)
    assert ended.cpu_user is not None and ended.cpu_user >= usage.cpu_user


# What the job says of itself, by other counters of the kernel's: of its processes, where those that are told are its cgroup's.
WITNESS = """
import json, mmap, os, resource, subprocess, time
MIB = 1 << 20
for child in [subprocess.Popen(["sleep", "0.2"]) for _ in range(5)]:
    child.wait()
held = b"x" * (32 * MIB)
page = mmap.mmap(-1, MIB)
page.write(b"y" * MIB)
file = os.open("file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
for _ in range(4):
    os.write(file, page)
os.lseek(file, 0, 0)
for _ in range(2):
    os.readv(file, [page])
enough = resource.getrusage(resource.RUSAGE_SELF).ru_utime + 0.2
while resource.getrusage(resource.RUSAGE_SELF).ru_utime < enough:  # and one system call for each turn
    pass
sizes = dict(line.split(":", 1) for line in open("/proc/self/status"))
told = dict(line.split(":", 1) for line in open("/proc/self/io"))
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
tasks = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in os.listdir("/proc") if pid.isdigit())
print(json.dumps({
    "user": sum(one.ru_utime for one in used), "system": sum(one.ru_stime for one in used), "tasks": tasks,
    "memory": int(sizes["RssAnon"].split()[0]) << 10, "read": int(told["read_bytes"]), "written": int(told["write_bytes"]),
}), flush=True)
os.mkfifo("go")
open("go").read()
"""


@pytest.mark.requires("disk")
async def test_what_is_told_is_what_the_job_itself_has_seen(tmp_path: Path) -> None:
    limits = Limits(cpus=0.4, memory=256 * MIB, pids=32, read_bps=1 << 40, write_bps=1 << 40)
    async with open_runner(tmp_path) as runner:
        begun = time.monotonic()
        job = await runner.start(JobSpec("python3", ("-c", WITNESS), limits=limits))
        async with job.log() as reader:
            with fail_after(30):
                line = await reader.next_line()
        usage = job.info().usage
        with fail_after(10):
            await anyio.to_thread.run_sync((runner.state.directory(job.job_id) / "work/go").write_text, "\n")
        ended = (await job.wait()).usage
    wall = time.monotonic() - begun
    assert line is not None
    seen = json.loads(line.data)
    slack = at_most(0.1)  # its birth and its pid 1
    for told in (usage, ended):
        assert told.cpu_user is not None and told.cpu_system is not None and told.throttled is not None
        cpu = seen["user"] + seen["system"]
        assert cpu - 0.02 <= told.cpu_user + told.cpu_system <= cpu * 1.1 + slack
        assert abs(told.cpu_user - seen["user"]) <= 0.2 * cpu + slack
        assert told.throttled <= (wall - cpu) * 1.1 + slack
        # A host that is busy itself gives a job less than its limit.
        assert told.throttled or (ended.wall is not None and cpu < 0.4 * ended.wall)
        assert told.read_bytes is not None and told.write_bytes is not None and told.write_ops is not None
        # The job's own count has what it dirtied of the file system's blocks, too, which a later commit writes.
        assert 4 * MIB <= told.write_bytes <= 4.1 * MIB and 4 * MIB <= seen["written"] <= 4.1 * MIB and told.write_ops >= 4
        assert seen["read"] <= told.read_bytes <= seen["read"] + 8 * MIB and seen["read"] >= 2 * MIB
        assert told.memory_peak is not None and seen["memory"] <= told.memory_peak <= seen["memory"] + 32 * MIB
        assert told.pids_peak in (7, None)  # pid 1, the command and five children; Linux 6.1 tells no peak on v2
    assert usage.memory is not None and seen["memory"] <= usage.memory <= seen["memory"] + 32 * MIB
    assert usage.pids == seen["tasks"] == 2
