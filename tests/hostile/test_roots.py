"""The root holds, also where pivot_root(2) is not allowed: as in a container, behind a filter that denies it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from jobrunner.shim import binary_path
from tests.hostile.arena import Arena, open_arena, outside

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.requires("root", "command:python3")]

WITHOUT_PIVOT = """#!{python}
import os, sys
import pyseccomp
rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
rules.set_attr(pyseccomp.Attr.CTL_NNP, 0)
rules.add_rule(pyseccomp.ERRNO(1), "pivot_root")
rules.load()
os.execv({shim!r}, [{shim!r}, *sys.argv[1:]])
"""
NO_PROTECTION = ("uid", "capabilities", "seccomp", "proc")


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["pivot_root", "chroot"])
async def entered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[str, Arena]]:
    """How jobs' roots are entered. For `chroot` every launcher is behind such a filter."""
    path = tmp_path_factory.mktemp("roots")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "chroot":
            launcher = path / "launcher"
            launcher.write_text(WITHOUT_PIVOT.format(python=sys.executable, shim=str(binary_path())))
            launcher.chmod(0o755)
            patch.setattr("jobrunner.launcher.binary_path", lambda: launcher)
        async with open_arena(path) as arena:
            yield request.param, arena


@pytest.fixture
def mark(tmp_path: Path) -> str:
    """Everybody on the host can see it: where a job does not, that is its root's doing, and not its uid's."""
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(directory.stat().st_mode | 0o055)
    path = tmp_path / "mark"
    path.touch()
    return str(path)


STOPPED = {"climb": "not there", "break_out": "EPERM", "uncover": "EPERM"}


async def test_nothing_above_the_root_can_be_reached(entered: tuple[str, Arena], mark: str) -> None:
    for name, why in STOPPED.items():
        assert (await entered[1].attack("roots", name, mark)).text == f"refused: {why}"
        assert (await entered[1].attack("roots", name, mark, writable=True)).text == f"refused: {why}"
    assert outside("roots", "climb", mark).startswith("succeeded")


async def test_what_holds_when_nothing_else_does(entered: tuple[str, Arena], mark: str) -> None:
    """After pivot_root(2) the host's root is nowhere. After chroot(2) it is below, and each of three keeps it there."""
    how, arena = entered
    for name in ("climb", "break_out"):
        assert (await arena.attack("roots", name, mark, without=NO_PROTECTION)).text == "refused: not there"
        assert (await arena.attack("roots", name, mark, without=NO_PROTECTION, writable=True)).text == "refused: not there"
    without = await arena.attack("roots", "uncover", mark, without=NO_PROTECTION)
    if how == "pivot_root":
        assert without.word == "refused"
        return
    assert without.text == "succeeded: uncovered"
    for layer in ("uid", "capabilities", "seccomp"):
        others = [other for other in NO_PROTECTION if other != layer]
        assert (await arena.attack("roots", "uncover", mark, without=others)).text == "refused: EPERM", layer


async def test_masks_and_writable_places_are_the_same(entered: tuple[str, Arena]) -> None:
    _, arena = entered
    assert (await arena.attack("files", "read", "/etc/shadow", "root:")).text == "refused: empty"
    assert (await arena.attack("files", "create", "/usr/hostile", without=["uid"])).text == "refused: EROFS"
    assert (await arena.attack("files", "create", "/tmp/ours")).text == "succeeded: made"
    assert (await arena.attack("files", "read", "/etc/shadow", "root:", writable=True)).text == "refused: empty"
    assert (await arena.attack("files", "create", "/usr/hostile", writable=True)).text == "succeeded: made"
    assert not Path("/usr/hostile").exists()
