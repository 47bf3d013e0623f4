"""A job cannot change the attributes of files: one of them is the project by which their directory is bounded."""

from __future__ import annotations

import platform

import pytest

from tests.hostile.arena import Arena

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.requires("root", "command:python3"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the attacks have the numbers of x86_64"),
]

LINUX = tuple(int(number) for number in platform.release().split(".")[:2])
ATTACKS = {
    "flags": ("set_flags", "/work"),
    "flags, by a command whose upper half nobody looks at": ("set_flags", "/work", "1"),
    "attributes": ("set_attributes", "/work"),
    **({"the newest call": ("file_setattr", "/work")} if LINUX >= (6, 17) else {}),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
async def test_attributes_of_files_stay_as_they_are(arena: Arena, attack: tuple[str, ...]) -> None:
    assert (await arena.attack("projects", *attack)).text == "refused: EPERM"
    assert (await arena.attack("projects", *attack, without=["seccomp"])).text == "succeeded: nodump"
