"""What holds up the event loop holds up every client.

A job's whole life on a real server, asked for by the SDK on the same loop, under blockbuster.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster, BlockBusterFunction

import jobrunner
from jobrunner.client import JobClient
from jobrunner.errors import StartFailed
from jobrunner.server.trust import SWEEP
from tests.support.runner import open_runner, run, shell
from tests.support.server import Running, eventually, serving
from tests.support.timing import fail_after

pytestmark = pytest.mark.requires("root")

PACKAGE = f"{Path(jobrunner.__file__).parent}{os.sep}"
UNSEEN = ("fsync", "fdatasync", "pread", "preadv", "open", "fstat", "ftruncate", "chown", "chmod", "posix_fallocate")
"""Of os, what blockbuster does not know."""
KERNEL = "cgroups, /proc, /sys: the kernel's memory"
NAME = "a name below the state directory"
ALLOWED = {
    "linux/kernfs.py": KERNEL,
    "linux/above.py": KERNEL,
    "linux/cgroup_v1.py": KERNEL,
    "linux/cgroup_v2.py": KERNEL,
    "linux/disk.py": KERNEL,
    "linux/mountinfo.py": KERNEL,
    "log/segments.py:_read_nowait": "RWF_NOWAIT: what is not in memory is read beside the loop",
    "log/segments.py:last_end": "the last record of a running job's index",
    "log/segments.py:list_segments": "names in a directory that has been read before",
    "shim/exitrecord.py:read_exit": "written by the launcher that has just told of it",
    "sandbox.py:open": "a FIFO, not waiting for its other end",
    "launcher.py": "a file in memory, and the vfork(2) of a small program",
    "server/audit.py:write": "a call that changes something is not carried out before it is in the audit log",
    "sandbox.py:_plan": NAME,
    "start.py:_new_id": NAME,
    "workspace.py:claim": NAME,
}
"""Functions of jobrunner below which something may block, FILE or FILE:FUNCTION, and why that is no wait to speak of."""


@contextmanager
def blocking_calls(allowed: Collection[str] = ALLOWED) -> Iterator[set[str]]:
    """What blocks on a running loop below jobrunner's code: the call, and jobrunner's functions around it, innermost first."""
    seen: set[str] = set()
    buster = BlockBuster()
    for name in UNSEEN:
        buster.functions[f"os.{name}"] = BlockBusterFunction(None, f"os.{name}")
    for name in ("acquire", "acquire_lock"):
        del buster.functions[f"threading.Lock.{name}"]  # of the pools of threads, which are what keeps the loop free
    for function in buster.functions.values():
        function.can_block_predicate = recording(function.full_name, function.can_block_predicate, seen, allowed)
    buster.activate()
    try:
        yield seen
    finally:
        buster.deactivate()


def recording(name: str, can_block: Callable[..., bool], seen: set[str], allowed: Collection[str]) -> Callable[..., bool]:
    """Asked whether to let a call through: always, so that no handler of errors can hide it; but it is written down."""

    def ask(*args: Any, **kwargs: Any) -> bool:
        if not can_block(*args, **kwargs):
            frame, around = sys._getframe(), []
            while frame := frame.f_back:  # type: ignore[assignment]
                file = frame.f_code.co_filename
                if "<frozen importlib" in file:
                    return True  # a module that is imported when it is first needed
                if file.startswith(PACKAGE):
                    around.append(f"{file.removeprefix(PACKAGE)}:{frame.f_code.co_name}")
            if around and not any(place in allowed or place.partition(":")[0] in allowed for place in around):
                seen.add(" < ".join([name, *around]))
        return True

    return ask


async def test_nothing_holds_up_the_event_loop(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"audit_log": tmp_path / "audit", "runner": {"workspaces": True, "keep_jobs": 2}}
    async with serving(tmp_path, **settings) as running:
        with blocking_calls() as seen, fail_after(40):
            await whole_life(running)
    assert seen == set()


async def whole_life(running: Running) -> None:
    pair = running.pair("admin", "admin")
    async with JobClient(running.address, ca=running.authority.pem, cert=pair.cert, key=pair.key) as client:
        await client.server()
        script = "echo one; head -c 3000000 /dev/zero; sleep 0.2; echo two"
        job = await client.start("sh", "-c", script, workspace="kept", env={"LARGE": "x" * 100_000})
        for selection in ({}, {"tail": 2}, {"since": 1.0}, {"offset": 1_000_000}):
            async with job.log(**selection) as output:
                while await output.next_line() is not None:
                    pass
        assert (await job.wait()).exit_code == 0
        with pytest.raises(StartFailed):
            await client.start("no-such-command")
        stopped = await client.start("sleep", "100")
        assert (await stopped.info()).usage.pids
        await stopped.stop()
        assert len(await client.list()) == 2
        before = repr(running.server.listener.context)
        running.authority.issue_server()
        await eventually(lambda: repr(running.server.listener.context) != before, 10 * SWEEP)
        await client.workspaces()
        await client.remove_workspace("kept")
        await client.remove(job.job_id)
        for _ in range(3):  # one more than are kept
            await (await client.start("true")).wait()
        await eventually(lambda: len(running.runner.catalog.jobs) == 2)


async def test_nothing_is_read_to_tell_of_a_job_that_has_ended(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        ended = await run(runner, shell("echo out"))
        job = await runner.get(ended.job_id)
        with blocking_calls(()) as seen:
            assert job.info() == ended
    assert seen == set()


async def test_what_holds_it_up_is_seen(tmp_path: Path) -> None:
    from jobrunner.statedir import StateDir

    with blocking_calls() as seen:
        StateDir(tmp_path / "state").close()
    assert any(call.startswith("os.fsync < durable.py:") for call in seen)
