"""Every exit code, and every signal that ends a process (but the real-time ones), are told as they were: kernel, shim, library."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from jobrunner import JobInfo
from jobrunner.runner import JobRunner
from tests.support.runner import open_runner, run, shell

AT_ONCE = 16
HARMLESS = {"SIGCHLD", "SIGCONT", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGWINCH"}
SIGNALS = [number for number in signal.Signals if number < 32 and number.name not in HARMLESS]


async def run_all(runner: JobRunner, scripts: list[str]) -> list[JobInfo]:
    """All of these, some at once, with their infos in the same order."""
    free = asyncio.Semaphore(AT_ONCE)

    async def one(script: str) -> JobInfo:
        async with free:
            return await run(runner, shell(script))

    return await asyncio.gather(*(one(script) for script in scripts))


@pytest.mark.timeout(120)
async def test_all_256_exit_codes(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        infos = await run_all(runner, [f"exit {code}" for code in range(256)])
    assert [(info.end_reason, info.exit_code, info.signal) for info in infos] == [("exited", code, None) for code in range(256)]
    assert [info.status for info in infos] == ["completed"] + ["failed"] * 255


async def test_every_signal_that_ends_a_process(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        infos = await run_all(runner, [f"kill -{number} $$" for number in SIGNALS])
    assert [(info.status, info.end_reason, info.exit_code, info.signal) for info in infos] == [
        ("failed", "signaled", None, number) for number in SIGNALS
    ]
