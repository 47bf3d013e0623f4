"""The least and the most that each limit may be, a step past either, and what is no limit. On the wire: tests/service."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobrunner import JobSpec, Limits
from jobrunner.errors import InvalidRequest, StartFailed
from jobrunner.limits import MAX_IOPS
from tests.support.runner import open_runner, run

pytestmark = pytest.mark.requires("root", "cgroup:memory", "disk")

MOST = 1 << 62
TEN_YEARS = 10 * 365 * 86400.0
EDGES: Mapping[str, tuple[float, float]] = {
    "cpus": (0.01, 4096.0),
    "memory": (1 << 20, MOST),
    "pids": (2, 1 << 22),
    "read_bps": (4096, MOST),
    "write_bps": (4096, MOST),
    "read_iops": (2, MOST),
    "write_iops": (2, MOST),
    "open_files": (4, 4096),
    "tmp_size": (1 << 16, 1 << 60),
    "work_size": (1 << 16, 1 << 60),
    "timeout": (0.001, TEN_YEARS),
    "idle_timeout": (0.001, TEN_YEARS),
    "output_limit": (1 << 16, MOST),
}
"""Of open files the most is the host's."""
NAMES = pytest.mark.parametrize("name", EDGES)
FRACTIONS = {"cpus", "timeout", "idle_timeout"}


def limits(name: str, value: Any) -> Limits:
    return Limits(**{name: value})


@NAMES
async def test_a_job_runs_with_the_least_and_the_most_of_a_limit(tmp_path: Path, name: str) -> None:
    async with open_runner(tmp_path) as runner:
        for value in EDGES[name]:
            info = await run(runner, JobSpec("true", limits=limits(name, value)))
            assert getattr(info.limits, name) == (min(value, MAX_IOPS) if name.endswith("iops") else value)
            assert info.status == "completed" or value == 0.001  # a deadline that may be over before the job is


@NAMES
async def test_what_is_past_either_edge_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    least, most = EDGES[name]
    values: list[Any] = [
        0,
        -1,
        least * 0.99 if name in FRACTIONS else least - 1,
        1 << 63,
        1 << 64,
        math.nan,
        math.inf,
        -math.inf,
        True,
        "1",
    ]
    values += [least + 0.5] if name not in FRACTIONS else []
    values += [math.nextafter(most, math.inf) if name in FRACTIONS else most + 1] if name != "open_files" else []
    async with open_runner(tmp_path) as runner:
        for value in values:
            with pytest.raises(InvalidRequest) as caught:
                await runner.start(JobSpec("true", limits=limits(name, value)))
            assert caught.value.message.startswith(f"cannot start job: limits.{name}: "), value
        assert runner.running == 0


async def test_more_open_files_than_the_host_allows_are_refused_with_the_remedy(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        with pytest.raises(StartFailed, match="rlimit: open-files: limits.open_files is above what this host allows"):
            await runner.start(JobSpec("true", limits=Limits(open_files=MOST)))


@NAMES
async def test_a_ceiling_is_allowed_and_one_more_is_refused_with_both(tmp_path: Path, name: str) -> None:
    ceiling = EDGES[name][0] * 64 if name in FRACTIONS else int(EDGES[name][0]) * 64
    more = ceiling * 1.01 if name in FRACTIONS else ceiling + 1
    async with open_runner(tmp_path, defaults=limits(name, ceiling), ceilings=limits(name, ceiling)) as runner:
        info = await run(runner, JobSpec("true", limits=limits(name, ceiling)))
        assert getattr(info.limits, name) == ceiling
        with pytest.raises(InvalidRequest) as caught:
            await runner.start(JobSpec("true", limits=limits(name, more)))
    assert caught.value.message == f"cannot start job: limits.{name}: {more} is above the server's ceiling, {ceiling}"
