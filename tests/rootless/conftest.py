"""`given("cgroups")`, `given("nothing")`: of one of the two runs alone, and left out in the other."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.hostile.arena import Arena, open_arena
from tests.rootless import CONFIG, GIVEN


def pytest_configure(config: pytest.Config) -> None:
    if os.geteuid() == 0:
        raise pytest.UsageError("tests/rootless is run as an ordinary user, by tests/system/test_rootless.py")
    config.addinivalue_line("markers", "given(what): left out where the user was given something else")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if any(mark.args != (GIVEN,) for mark in item.iter_markers("given"))]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def arena(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Arena]:
    async with open_arena(tmp_path_factory.mktemp("arena"), **CONFIG) as arena:
        yield arena
