"""What a caller may ask for, whose job is contained: names that lead elsewhere, and requests that are as large as can be."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner import StartFailed
from jobrunner.spec import MAX_ARG, MAX_ARGS, MAX_ARGS_TOTAL
from tests.hostile.arena import Arena

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.requires("root", "command:python3")]

UP = "/.." * 24


@pytest.mark.parametrize("what", ["cwd", "command"])
async def test_no_descriptor_of_the_launchers_leads_out(arena: Arena, what: str, tmp_path: Path) -> None:
    """Before execve(2) a job is a process of ours: what that has open could be named by /proc/self/fd (CVE-2024-21626)."""
    before = os.listdir(arena.runner.state.path / "jobs")
    for number in range(3, 32):
        name = f"/proc/self/fd/{number}{UP}"
        with pytest.raises(StartFailed) as caught:
            await (arena.start("/bin/true", cwd=name) if what == "cwd" else arena.start(f"{name}/bin/true"))
        assert caught.value.step == ("cwd" if what == "cwd" else "exec"), number
    assert os.listdir(arena.runner.state.path / "jobs") == before
    # Such names are followed: it is that nothing is behind them.
    job = await (arena.start("/bin/true", cwd=f"/proc/self/root{UP}") if what == "cwd" else arena.start("/proc/self/root/bin/true"))
    assert (await job.wait()).status == "completed"


@pytest.fixture
def small_stack() -> Iterator[None]:
    """execve(2) takes a quarter of the stack's limit for arguments and environment, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def as_many_as_can_be(total: int) -> tuple[str, ...]:
    return tuple("x" * (MAX_ARG - 8) for _ in range(total // MAX_ARG - 1))


async def test_a_list_that_is_too_long_for_the_kernel_fails_as_exec(arena: Arena, small_stack: None) -> None:
    with pytest.raises(StartFailed) as caught:
        await arena.start("/bin/true", *as_many_as_can_be(MAX_ARGS_TOTAL))
    assert (caught.value.step, caught.value.errno) == ("exec", errno.E2BIG)
    with pytest.raises(StartFailed) as caught:
        await arena.start("/bin/true", env={f"V{n}": text for n, text in enumerate(as_many_as_can_be(MAX_ARGS_TOTAL))})
    assert (caught.value.step, caught.value.errno) == ("exec", errno.E2BIG)
    assert arena.runner.running == 1


async def test_the_longest_lists_that_are_taken_are_passed_whole(arena: Arena) -> None:
    outcome = await arena.attack(
        "requests", "count", *["x"] * (MAX_ARGS - 100), env={f"V{n}": "" for n in range(MAX_ARGS // 2 - 100)}
    )
    assert outcome.word == "succeeded"
    arguments, variables = map(int, outcome.why.split())
    assert arguments == MAX_ARGS - 100
    assert variables >= MAX_ARGS // 2 - 100
    job = await arena.start("/bin/true", *as_many_as_can_be(MAX_ARGS_TOTAL - 65536))
    assert (await job.wait()).status == "completed"
