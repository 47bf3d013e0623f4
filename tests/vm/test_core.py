"""No program of the host's is started for a job that crashes, although core_pattern is a pipe. Only in the virtual machine
(run.sh), because that setting is the host's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.arena import Arena, open_arena
from tests.support.runner import output
from tests.support.shim import wait_until

PATTERN = Path("/proc/sys/kernel/core_pattern")
CRASH = """
import os, resource, signal, sys
if sys.argv[1:]:
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
print(*resource.getrlimit(resource.RLIMIT_CORE), flush=True)
os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.fixture
def handled(tmp_path: Path) -> Iterator[Path]:
    """A file with a line for each crash that the host's handler was told of."""
    if os.environ.get("JOBRUNNER_IN_VM") != "1":
        pytest.fail("this changes the host's core_pattern: run it by make test-vm", pytrace=False)
    told, handler = tmp_path / "told", tmp_path / "handler"
    told.touch()
    handler.write_text(f"#!/bin/sh\ncat > /dev/null\necho $1 >> {told}\n")
    handler.chmod(0o755)
    before = PATTERN.read_text()
    PATTERN.write_text(f"|{handler} %e-%c")
    try:
        yield told
    finally:
        PATTERN.write_text(before)


async def crash(arena: Arena, *limit: str, **how: Any) -> bytes:
    job = await arena.start("/usr/bin/python3", "-c", CRASH, *limit, **how)
    data = await output(job)
    assert (await job.wait()).signal == 11
    return data


async def test_the_hosts_handler_is_not_started_for_a_job_that_crashes(tmp_path: Path, handled: Path) -> None:
    async with open_arena(tmp_path) as arena:
        assert await crash(arena) == b"1 1\n"
        assert await crash(arena, "0") == b"1 1\n"  # and is told that it is done
        assert await crash(arena, "0", without=["seccomp"]) == b"0 0\n"  # the last one: when it was told of, so were those before
        wait_until(lambda: handled.read_text() != "", 60)
    assert handled.read_text().split() == ["python3-0"]
