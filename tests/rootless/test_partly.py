"""A user who was given some controllers: those limit, and the others are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobrunner import Limits
from jobrunner.errors import HostError
from tests.rootless import CONFIG, MISSING
from tests.support.runner import open_runner, run, shell

pytestmark = pytest.mark.given("memory and pids")


async def test_a_job_is_limited_by_what_there_is_and_told_the_rest(tmp_path: Path) -> None:
    hungry = shell("python3 -c 'bytearray(200 << 20)[::4096] = bytes(51200)'", limits=Limits(memory=64 << 20))
    many = shell("i=0; while [ $i -lt 20 ]; do sleep 5 & i=$((i+1)); done", limits=Limits(pids=8))
    async with open_runner(tmp_path, **CONFIG) as runner:
        infos = [await run(runner, hungry), await run(runner, many)]
    assert [info.end_reason for info in infos] == ["oom_killed", "exited"]
    assert infos[1].exit_code != 0
    assert infos[1].usage.pids_peak == 8
    assert [text.partition(":")[0] for text in infos[0].missing] == [*MISSING, "uid"]


async def test_the_others_have_to_be_allowed_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot apply limit cpus: .*; .*") as caught:
        async with open_runner(tmp_path, **{**CONFIG, "allow_missing": ()}):
            pass
    assert "Delegate=" in caught.value.message
