"""Bounds are told as they are: docs/bounds.md, the settings and what is refused say the same."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from jobrunner.bounds import READERS, Bounds
from jobrunner.config import RunnerConfig
from jobrunner.errors import ConfigError
from jobrunner.settings import KEYS, load, load_runner

DOCUMENT = Path(__file__).parents[2] / "docs/bounds.md"
GIVEN = {"state_dir": "/state", "ca": "/ca", "cert": "/cert", "key": "/key"}
OF_JOBS = [one.name for one in fields(RunnerConfig) if re.search("^max_|_per_user$|_timeout$", one.name)]
DEFAULTS = {name: getattr(RunnerConfig(state_dir=Path("/state")), name) for name in OF_JOBS}
DEFAULTS |= {name: getattr(Bounds(), name) for name in READERS}


def told() -> dict[str, str]:
    """Key and default of each row; what comes after a colon is why."""
    return dict(re.findall(r"^\| `(\w+)` \| ([^:|]+?)(?::[^|]*)? \|", DOCUMENT.read_text(), re.MULTILINE))


def test_every_bound_is_told_with_its_default_and_every_one_that_is_told_is_a_key() -> None:
    assert set(told()) == set(DEFAULTS)
    assert {key: KEYS[key](default.replace(" ", "")) for key, default in told().items()} == DEFAULTS


def test_each_is_read_from_the_environment() -> None:
    values = {key: KEYS[key](default.replace(" ", "")) * 2 for key, default in told().items()}
    config = load(None, {f"JOBRUNNERD_{key.upper()}": str(value) for key, value in values.items()}, GIVEN)
    read = {key: getattr(config.bounds if key in READERS else config.runner, key) for key in values}
    assert read == values


@pytest.mark.parametrize("key", sorted(DEFAULTS))
@pytest.mark.parametrize("value", ["0", "1e300", "some"])
def test_what_is_out_of_range_is_refused_with_the_range(key: str, value: str) -> None:
    name = f"JOBRUNNERD_{key.upper()}"
    with pytest.raises(ConfigError, match=f"cannot read the environment: {name}: .*({value}|number|size|duration)"):
        load(None, {name: value}, GIVEN)


def test_what_follows_from_another_bound_follows_it() -> None:
    bounds = Bounds(max_message=1 << 20, max_calls_per_second=1000)
    assert (bounds.max_messages_per_user, bounds.max_frames_per_second) == (8 << 20, 8000)
    assert Bounds(max_calls_per_second=1).max_frames_per_second == 1000


def test_a_message_may_not_be_longer_than_all_of_a_user_s() -> None:
    environ = {"JOBRUNNERD_MAX_MESSAGE": "1MiB", "JOBRUNNERD_MAX_MESSAGES_PER_USER": "64KiB"}
    reason = "cannot read configuration: max_messages_per_user: 65536 is less than max_message, 1048576"
    with pytest.raises(ConfigError, match=reason):
        load(None, environ, GIVEN)
    with pytest.raises(ConfigError, match=reason):  # of `jobrunnerd check`
        load_runner(None, environ, GIVEN)
