"""What a job costs that is dear on every host, counted and not timed: syncs of the disk, processes, programs executed.

Each is a promise (docs/formats.md) or a process of ARCHITECTURE.md's picture; whoever adds one says here what for.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.requires("root", "command:strace")

JOBS = 3
LIFE = f"""
import asyncio, os, sys
from pathlib import Path
from jobrunner import JobSpec
from jobrunner.config import RunnerConfig
from jobrunner.runner import JobRunner

async def main():
    async with JobRunner.open(RunnerConfig(state_dir=Path(sys.argv[1]))) as runner:
        for mark in (1, {JOBS}, 0):
            os.getpriority(os.PRIO_PROCESS, 0)  # seen in the trace
            for _ in range(mark):
                await (await runner.start(JobSpec(*sys.argv[2:3], tuple(sys.argv[3:])))).wait()
            await runner.settled()

asyncio.run(main())
"""
SYNCS = ("fsync", "fdatasync")
BIRTHS = ("fork", "vfork", "clone", "clone3")


def cost(tmp_path: Path, *command: str) -> Counter[str]:
    """Calls of all processes for one job, but for threads."""
    trace = tmp_path / "trace"
    calls = ",".join((*SYNCS, *BIRTHS, "execve", "getpriority"))
    strace = ("strace", "-f", "-qq", "--seccomp-bpf", "-o", str(trace), "-e", f"trace={calls}", "-e", "signal=none")
    subprocess.run([*strace, sys.executable, "-c", LIFE, str(tmp_path / "state"), *command], check=True, timeout=60)
    _, _, measured, _ = re.split(r"^\d+ +getpriority\(.*\n", trace.read_text(), flags=re.MULTILINE)
    lines = [line for line in measured.splitlines() if "CLONE_THREAD" not in line]
    found = Counter(match[1] for line in lines if (match := re.match(r"\d+ +([a-z0-9]+)\(", line)))
    assert all(number % JOBS == 0 for number in found.values()), found
    return Counter({name: number // JOBS for name, number in found.items()})


def test_a_job_without_output_is_eight_syncs_four_processes_and_two_programs(tmp_path: Path) -> None:
    found = cost(tmp_path, "/bin/true")
    # Before it: the record, its marker, its names. The shim: the exit record and its name; in the end, the log's names, the record.
    assert {name: found[name] for name in SYNCS} == {"fsync": 6, "fdatasync": 2}
    assert sum(found[name] for name in BIRTHS) == 4  # launcher, shim, init, command
    assert found["execve"] == 2  # launcher, command


def test_output_is_two_syncs_more(tmp_path: Path) -> None:
    found = cost(tmp_path, "/bin/echo", "hello")
    assert sum(found[name] for name in SYNCS) == 10  # a segment's bytes, and its index
