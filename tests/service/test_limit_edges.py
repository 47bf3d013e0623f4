"""Limits on the wire and in the SDK have the edges that they have in the library."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobrunner import Limits
from jobrunner.client import JobClient
from jobrunner.config import DEFAULTS
from jobrunner.errors import InvalidRequest
from tests.kernel.test_limit_edges import EDGES, TEN_YEARS
from tests.support.server import failure, message, serving, unary

pytestmark = pytest.mark.requires("root", "cgroup:memory", "disk")


async def test_the_wire_s_numbers_have_the_same_edges(tmp_path: Path) -> None:
    """With a client that checks nothing."""
    async with serving(tmp_path) as running, running.channel() as channel:
        for name, (least, most) in EDGES.items():
            if name.endswith("timeout"):
                values: list[Any] = [
                    {"seconds": 0, "nanos": 0},
                    {"seconds": -1},
                    {"seconds": int(TEN_YEARS) + 1},
                    {"nanos": 100_000},
                ]
            elif name == "cpus":
                values = [0.0, -1.0, least * 0.99, most * 1.01, math.nan, math.inf]
            else:
                values = [0, int(least) - 1, (1 << 64) - 1, 1 << 63]
            for value in values:
                request = message("JobStartRequest", command="true", limits={name: value})
                status, told = await failure(unary(channel, "Start", "JobStartResponse")(request))
                assert (status.name, f"limits.{name}: " in told) == ("INVALID_ARGUMENT", True), (name, value, told)
        assert running.runner.running == 0


async def test_a_client_hears_of_floors_and_ceilings_as_of_all_else(tmp_path: Path) -> None:
    ceilings = Limits(memory=64 << 20)
    async with serving(tmp_path, runner={"ceilings": ceilings, "defaults": replace(DEFAULTS, memory=64 << 20)}) as running:
        pair = running.pair("admin", "admin")
        async with JobClient(running.address, ca=running.authority.pem, cert=pair.cert, key=pair.key) as client:
            with pytest.raises(InvalidRequest, match=r"cannot start job: limits.write_bps: 1 is below 4096, a page in each second"):
                await client.start("true", limits=Limits(write_bps=1))
            with pytest.raises(InvalidRequest, match=r"limits.memory: 67108865 is above the server's ceiling, 67108864"):
                await client.start("true", limits=Limits(memory=(64 << 20) + 1))
