"""A job that takes all it can get: it meets its own limit, is told so, and nobody else notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobrunner import Gap, Limits
from tests.hostile.arena import SMALL, Arena, outside, program
from tests.support.timing import fail_after

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.requires("root", "cgroup:memory", "cgroup:pids", "command:python3"),
]

LIMIT_MIB = (SMALL.memory or 0) >> 20
TWICE = str(2 * LIMIT_MIB)

MEMORY = {
    "anonymous pages": ("memory", TWICE),
    "a file without a name": ("memfd", TWICE),
    "System V shared memory": ("shared_memory", TWICE),
    "many processes, each within the limit": ("memory_of_children", str(LIMIT_MIB // 4), "8"),
    "files in /dev/shm": ("fill", "/dev/shm/bomb", TWICE),
    "files in /tmp": ("fill", "/tmp/bomb", TWICE),
}


@pytest.mark.parametrize("bomb", MEMORY.values(), ids=MEMORY)
async def test_memory_is_the_jobs_own(arena: Arena, bomb: tuple[str, ...]) -> None:
    """Where the file system would hold more, the memory that it is made of does not."""
    large = {"tmp_size": 1 << 30}
    outcome = await arena.attack("bombs", *bomb, change=large)
    assert outcome.text == "oom_killed"
    assert outcome.info.usage.memory_peak is not None
    assert outcome.info.usage.memory_peak <= LIMIT_MIB << 20
    assert "out of memory: the limit is" in outcome.info.message
    assert (await arena.attack("bombs", *bomb, change=large, without=["limits"])).word == "succeeded"


FULL = {
    "/tmp": ("fill", "/tmp/bomb", "32"),
    "/dev/shm": ("fill", "/dev/shm/bomb", "32"),
    "/work": ("fill", "/work/bomb", "32"),
    "inodes of /tmp": ("names", "/tmp", "20000"),
    "inodes of /dev/shm": ("names", "/dev/shm", "20000"),
    "inodes of /work": ("names", "/work", "20000"),
}


@pytest.mark.parametrize("bomb", FULL.values(), ids=FULL)
async def test_what_a_job_may_write_to_has_a_size(arena: Arena, bomb: tuple[str, ...]) -> None:
    sizes = {"tmp_size": 16 << 20, "work": "", "work_size": 16 << 20}
    assert (await arena.attack("bombs", *bomb, change=sizes)).text == "refused: ENOSPC"
    larger = {"tmp_size": 64 << 20, "work": "", "work_size": 64 << 20}
    assert (await arena.attack("bombs", *bomb, change=larger)).word == "succeeded"


async def test_a_fork_bomb_meets_its_limit_and_goes_with_the_job(arena: Arena) -> None:
    outcome = await arena.attack("bombs", "forks", "200")
    assert outcome.text == "refused: EAGAIN"
    assert outcome.info.usage.pids_peak == SMALL.pids
    assert (await arena.attack("bombs", "forks", "200", without=["limits"])).text == "succeeded: 200 children"


async def test_open_files_are_bounded_for_each_process(arena: Arena) -> None:
    few = Limits(memory=SMALL.memory, pids=SMALL.pids, open_files=64)
    assert (await arena.attack("bombs", "descriptors", "500", limits=few)).text == "refused: EMFILE"
    assert (await arena.attack("bombs", "descriptors", "500", limits=few, change={"open_files": 600})).word == "succeeded"


async def test_a_flood_of_output_keeps_its_last_bytes_and_tells_the_rest(arena: Arena) -> None:
    """The bystander's log, on the same disk, is untouched: the arena reads on in it."""
    with fail_after(40):
        job = await arena.start(*program("bombs", "flood", "64"))
        info = await job.wait()
        async with job.log() as reader:
            parts = [part async for part in reader]
    kept = sum(path.stat().st_size for path in (arena.runner.state.directory(job.job_id) / "log").iterdir())
    assert info.log_end >= 64 << 20
    assert kept <= (SMALL.output_limit or 0)
    assert isinstance(parts[0], Gap) and (parts[0].first, parts[0].reason) == (0, "dropped")
    await arena.heartbeat()
    everything = await arena.start(*program("bombs", "flood", "64"), change={"output_limit": None})
    assert (await everything.wait()).log_start == 0


async def test_a_flood_can_end_the_job_and_is_told(arena: Arena) -> None:
    outcome = await arena.attack("bombs", "flood", "64", change={"output_policy": "stop"})
    assert outcome.text == "output_limit"
    assert outcome.info.status == "terminated"


async def test_cpu_time_is_the_jobs_own(arena: Arena) -> None:
    tenth = Limits(memory=SMALL.memory, pids=SMALL.pids, cpus=0.1)
    held = await arena.attack("bombs", "spin", "2", "2", limits=tenth)
    free = await arena.attack("bombs", "spin", "2", "2", limits=tenth, without=["limits"])
    assert float(held.why) < 0.1 * (held.info.usage.wall or 0) + 0.1
    assert float(free.why) > 1.5 * float(held.why)


async def test_no_core_file_is_left(arena: Arena, tmp_path: Path) -> None:
    assert (await arena.attack("bombs", "crash")).text == "refused: no core"
    assert outside("bombs", "crash", cwd=tmp_path) == "succeeded: a core"
