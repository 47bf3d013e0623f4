"""`--output-limit` and `--output-policy`, from the command line to the disk and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.cli import jobrunner, start

if TYPE_CHECKING:
    from tests.support.daemon import ServerProcess

pytestmark = pytest.mark.requires("root")

FLOOD = ("sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' x")


def test_the_oldest_output_goes_and_the_rest_is_shown(server: ServerProcess) -> None:
    job_id = start(server, "--output-limit", "64KiB", *FLOOD)
    assert jobrunner(server, "wait", job_id).code == 0
    result = jobrunner(server, "log", job_id)
    assert 40_000 < len(result.out) < 65536
    assert set(result.out) == {ord("x")}
    assert "dropped" in result.err or "missing" in result.err


def test_output_past_the_limit_ends_the_job_and_says_why(server: ServerProcess) -> None:
    result = jobrunner(server, "run", "--output-limit", "64KiB", "--output-policy", "stop", "--grace", "1s", "yes")
    assert result.code == 143
    assert 60_000 < len(result.out) < 65536
    assert "terminated: ended at its output limit of 65536 bytes" in result.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--output-limit", "64k"), "64000 is not between 65536 and"),
        (("--output-limit", "much"), "limits.output_limit: 'much'"),
        (("--output-policy", "loud"), "limits.output_policy: 'loud' is not one of drop-oldest, stop"),
    ],
)
def test_a_limit_or_policy_that_no_job_can_have_is_refused(server: ServerProcess, options: tuple[str, str], reason: str) -> None:
    result = jobrunner(server, "start", *options, "true")
    assert result.code == 65
    assert reason in result.err
