"""A memory limit is without swap, on a host that has some to give."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from jobrunner import JobSpec, Limits
from jobrunner.linux.kernfs import has_swap
from tests.support.runner import open_runner, output
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root", "cgroup:memory", "disk")

MIB = 1 << 20
LIMIT, WANTED = 48 * MIB, 80 * MIB
GROWS = f"""
import os
os.mkfifo("go")
held = b"x" * {LIMIT // 2}
print("up", flush=True)
open("go").read()
held = b"x" * {WANTED}
(swapped,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSwap"))
print("swapped", swapped)
"""


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """The host has some: the virtual machine always, others for this test."""
    file = tmp_path / "swap"
    if has_swap():
        yield
        return
    with file.open("wb") as made:
        made.write(bytes(128 * MIB))
    file.chmod(0o600)
    subprocess.run(["mkswap", file], check=True, capture_output=True)
    subprocess.run(["swapon", file], check=True)
    try:
        yield
    finally:
        subprocess.run(["swapoff", file], check=True)


def swap_left() -> int:
    (free,) = (line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("SwapFree:"))
    return int(free) << 10


@pytest.mark.parametrize("allowed", [False, True], ids=["as it is", "allowed"])
async def test_a_job_past_its_memory_is_killed_and_not_swapped_out(tmp_path: Path, swap: None, allowed: bool) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(JobSpec("python3", ("-c", GROWS), limits=Limits(memory=LIMIT)))
        async with job.log() as reader:
            await reader.next_line()
        assert job.cgroup is not None
        assert not any("swap" in text for text in job.info().missing)
        assert swap_left() > WANTED
        if allowed:
            paths = job.cgroup.paths
            v1 = "memory" in paths
            file = Path(paths["memory"], "memory.memsw.limit_in_bytes") if v1 else Path(paths["unified"], "job/memory.swap.max")
            file.write_text("-1" if v1 else "max")
        with fail_after(10):
            await anyio.to_thread.run_sync((runner.state.directory(job.job_id) / "work/go").write_text, "\n")
        data = await output(job, seconds=60)
        info = await job.wait()
    assert info.usage.memory_peak is not None and info.usage.memory_peak <= LIMIT
    if not allowed:
        assert (info.end_reason, data) == ("oom_killed", b"up\n")
        return
    _, swapped = data.split(b"swapped ")
    assert info.status == "completed" and int(swapped) << 10 >= WANTED - LIMIT
