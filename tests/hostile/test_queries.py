"""What the kernel tells of the host to who asks by its newest calls: nothing that is not the job's own."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator

import pytest

from tests.hostile.arena import Arena, outside

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.requires("root", "command:python3"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the attacks have the numbers of x86_64"),
]


@pytest.fixture
def victim() -> Iterator[int]:
    """A process of the host, that ends with the test."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.linux(6, 14)
async def test_a_process_of_the_host_has_no_handle(arena: Arena, victim: int) -> None:
    """A number that can be guessed: beside the filter it is the PID namespace that it means nothing in."""
    pidfd = os.pidfd_open(victim)
    number = str(os.fstat(pidfd).st_ino)
    os.close(pidfd)
    attack = "queries", "process_by_handle", number
    assert (await arena.attack(*attack)).text == "refused: EPERM"
    assert (await arena.attack(*attack, without=["seccomp"])).text == "refused: ESTALE"
    assert (await arena.attack(*attack, without=["seccomp", "uid", "capabilities"])).text == "refused: ESTALE"
    assert outside(*attack) == "succeeded: a process"


@pytest.mark.linux(6, 12)
async def test_other_mount_namespaces_cannot_be_gone_through(arena: Arena) -> None:
    """Not even by who has every capability, in a PID namespace of his own."""
    assert (await arena.attack("queries", "next_mount_namespace")).text == "refused: EPERM"
    assert (await arena.attack("queries", "next_mount_namespace", without=["uid", "capabilities"])).text == "refused: EPERM"
    assert outside("queries", "next_mount_namespace") == "succeeded: another"


@pytest.mark.linux(6, 8)
async def test_mounts_of_others_are_not_told(arena: Arena) -> None:
    attack = "queries", "foreign_mounts", "2000"
    refused = await arena.attack(*attack)
    assert refused.word == "refused" and refused.why.startswith("none but "), refused
    assert (await arena.attack(*attack, without=["uid", "capabilities"])).word == "succeeded"
