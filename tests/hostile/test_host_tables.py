"""What the kernel has once for the whole host: a job takes none of it from others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobrunner import Limits
from tests.hostile.arena import SMALL, Arena, outside, program
from tests.hostile.test_layers import Case, hold
from tests.support.timing import fail_after

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.requires("root", "cgroup:memory", "command:python3")]

MIB = 1 << 20


async def test_asynchronous_io_has_one_table_and_jobs_have_none_of_it(arena: Arena) -> None:
    """fs.aio-max-nr; the control is one context, where all could be had as well."""
    await hold(arena, Case(("tables", "aio_context"), {"seccomp": "ENOSYS"}))


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """A few, as a host has for a database."""
    sysctl = Path("/proc/sys/vm/nr_hugepages")
    before = sysctl.read_text()
    sysctl.write_text(str(int(before) + 8))
    yield
    sysctl.write_text(before)


@pytest.mark.parametrize("how", ["map_huge", "huge_file"])
async def test_huge_pages_of_the_host_are_not_taken(arena: Arena, huge_pages: None, how: str) -> None:
    """They are no part of what memory.max counts."""
    await hold(arena, Case(("tables", how), {"seccomp": "ENOMEM"}))


async def test_terminals_of_others_are_left(arena: Arena) -> None:
    """The kernel has some thousands for all jobs together."""
    most = int(Path("/proc/sys/kernel/pty/max").read_text())
    many: dict[str, Any] = {"limits": Limits(memory=SMALL.memory, pids=SMALL.pids, open_files=2 * most)}
    with fail_after(40):
        job = await arena.start(*program("tables", "keep_terminals", str(2 * most)), **many)
        async with job.log() as reader:
            line = await reader.next_line()
        ours, theirs = os.openpty()
        os.close(ours)
        os.close(theirs)
        assert (await arena.attack("tables", "terminals", "1")).text == "succeeded: 1"
        await job.stop(grace=0)
    assert line is not None and line.data == b"128 terminals\n"
    assert most > 10 * 128
    assert outside("tables", "terminals", "200") == "succeeded: 200"


async def test_what_sockets_hold_in_the_kernel_is_the_jobs_own(arena: Arena) -> None:
    """Buffers of TCP over the job's own loopback. On v2 they are memory of the job's, on v1 on an account of their own."""
    little: dict[str, Any] = {"limits": Limits(memory=48 * MIB, pids=SMALL.pids, open_files=1024)}
    before = socket_bytes()
    with fail_after(60):
        job = await arena.start(*program("tables", "fill_sockets", "192"), **little)
        async with job.log() as reader:
            line = await reader.next_line()
        held = socket_bytes() - before
        info = await job.stop(grace=0)
        free = await arena.start(*program("tables", "fill_sockets", "192"), **little, without=["limits"])
        async with free.log() as reader:
            assert await reader.next_line() is not None
        grown = socket_bytes() - before
        await free.stop(grace=0)
    assert info.end_reason == ("oom_killed" if line is None else "stopped")
    assert held < 64 * MIB
    assert grown > 72 * MIB


def socket_bytes() -> int:
    """All TCP of the host, whatever the network namespace: sockstat's `mem`, in pages."""
    line = next(line for line in Path("/proc/net/sockstat").read_text().splitlines() if line.startswith("TCP:"))
    words = line.split()
    return int(words[words.index("mem") + 1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.generation("v1")  # v2 counts it with the job's memory
async def test_the_limit_of_sockets_is_the_jobs_memory_limit(arena: Arena) -> None:
    job = await arena.start("/bin/sleep", "600")
    assert job.cgroup is not None
    assert Path(job.cgroup.paths["memory"], "memory.kmem.tcp.limit_in_bytes").read_text() == f"{SMALL.memory}\n"
    await job.stop(grace=0)


async def test_what_netlink_holds_in_the_kernel_is_not_to_be_had(arena: Arena) -> None:
    """What one sends oneself stays there on nobody's account; that it is refused is test_layers'."""
    before = kernel_memory()
    with fail_after(40):
        job = await arena.start(*program("tables", "fill_netlink", "64"), limits=Limits(memory=48 * MIB), without=["seccomp"])
        async with job.log() as reader:
            line = await reader.next_line()
        grown = kernel_memory() - before
        info = await job.stop(grace=0)
    assert line is not None
    assert grown > 48 * MIB
    assert info.end_reason == "stopped"


def kernel_memory() -> int:
    """The kernel's own, in bytes, by either of its allocators: proc(5), meminfo."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("SUnreclaim:", "VmallocUsed:")))


async def test_programs_for_the_kernel_can_still_be_written(arena: Arena) -> None:
    """Sandboxes filter their own calls; what is taken of the host's memory for that goes with the process."""
    assert (await arena.attack("filters", "confine_oneself")).text == "succeeded: confined"
