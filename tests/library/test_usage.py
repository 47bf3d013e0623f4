"""What a job uses, told while it runs."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from jobrunner import JobSpec, Limits
from tests.support.cgroups import member_directories
from tests.support.runner import open_runner
from tests.support.timing import fail_after

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
