"""The values: which requests can be jobs at all, and which status an ending means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobrunner import JobSpec, JobStatus, Limits
from jobrunner.errors import InvalidRequest
from jobrunner.job import Ending, EndReason, Job, describe, is_job_id, signal_name, signal_number

STATUS = {
    "exited": "failed",
    "signaled": "failed",
    "oom_killed": "failed",
    "lost": "failed",
    "stopped": "terminated",
    "deadline": "terminated",
    "idle_timeout": "terminated",
    "output_limit": "terminated",
    "log_error": "terminated",
    "shutdown": "terminated",
}


@pytest.mark.parametrize("reason", list(EndReason))
def test_each_end_reason_has_the_status_of_the_design(reason: EndReason) -> None:
    assert Ending(reason, 0.0, exit_code=3 if reason == "exited" else None).status == STATUS[reason]


def test_only_exit_code_0_by_itself_is_completed() -> None:
    assert Ending(EndReason.EXITED, 0.0, exit_code=0).status is JobStatus.COMPLETED
    assert Ending(EndReason.STOPPED, 0.0, exit_code=0).status is JobStatus.TERMINATED


def test_a_job_ends_once() -> None:
    job = Job("0123456789ab", JobSpec("true"), Limits())
    assert str(job.status) == "running"
    job.end(Ending(EndReason.EXITED, 1.0, exit_code=0))
    with pytest.raises(AssertionError, match="has ended already"):
        job.end(Ending(EndReason.LOST, 2.0))
    assert str(job.status) == "completed"


@pytest.mark.parametrize("reason", list(EndReason))
def test_every_ending_is_told_in_a_sentence(reason: EndReason) -> None:
    assert describe(Ending(reason, 0.0, exit_code=1), Limits())


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("command", {"command": ""}),
        ("command", {"command": "a\0b"}),
        ("root", {"command": "ls", "root": "../x"}),
        ("user", {"command": "ls", "user": "a b"}),
        ("workspace", {"command": "ls", "workspace": ".."}),
        ("network", {"command": "ls", "network": "bridge"}),
        ("volumes", {"command": "ls", "volumes": ("a:rw",)}),
        ("volumes", {"command": "ls", "volumes": ("",)}),
        ("volumes", {"command": "ls", "volumes": ("a", "a:ro")}),
        ("volumes", {"command": "ls", "volumes": tuple(f"v{number}" for number in range(65))}),
        ("args[1]", {"command": "echo", "args": ("a", "b\0")}),
        ("args[0]", {"command": "echo", "args": ("x" * 131072,)}),
        ("args", {"command": "echo", "args": ("x" * 100_000,) * 11}),
        ("args", {"command": "echo", "args": ("x",) * 32_001}),
        ("env", {"command": "echo", "env": {f"N{number}": "" for number in range(16_001)}}),
        ("env", {"command": "echo", "env": {"A=B": "x"}}),
        ("env", {"command": "echo", "env": {"": "x"}}),
        ("env[A]", {"command": "echo", "env": {"A": "x\0"}}),
        ("cwd", {"command": "echo", "cwd": "relative"}),
        ("name", {"command": "echo", "name": "-x"}),
        ("name", {"command": "echo", "name": "x" * 129}),
        ("labels", {"command": "echo", "labels": {"": "x"}}),
        ("stop_signal", {"command": "echo", "stop_signal": "NOSUCH"}),
        ("stop_signal", {"command": "echo", "stop_signal": "0"}),
        ("stop_signal", {"command": "echo", "stop_signal": "STOP"}),
        ("grace", {"command": "echo", "grace": -1.0}),
        ("grace", {"command": "echo", "grace": float("nan")}),
    ],
)
def test_what_no_job_can_have_is_refused_with_its_field(field: str, spec: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        JobSpec(**spec)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert caught.value.message.startswith(f"cannot start job: {field}: ")


@pytest.mark.parametrize("name", ["cpus", "memory", "pids", "read_bps", "write_bps", "open_files", "timeout", "idle_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e300, True])
def test_limits_that_are_no_limits_are_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"limits.{name}"):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_a_limit_above_its_ceiling_or_unset_under_one_is_refused() -> None:
    ceilings = Limits(memory=1 << 30, timeout=60.0)
    Limits(memory=1 << 30, timeout=1.0).check_ceilings(ceilings)
    with pytest.raises(InvalidRequest, match="limits.memory.*above the server's ceiling"):
        Limits(memory=(1 << 30) + 1, timeout=1.0).check_ceilings(ceilings)
    with pytest.raises(InvalidRequest, match="limits.timeout.*must be set"):
        Limits(memory=1 << 20).check_ceilings(ceilings)


@given(st.text(max_size=20))
def test_a_job_id_is_12_hexadecimal_characters_and_nothing_else(text: str) -> None:
    assert is_job_id(text) == (len(text) == 12 and all(c in "0123456789abcdef" for c in text))


@pytest.mark.parametrize("name", ["TERM", "SIGTERM", "sigterm", "15"])
def test_signals_by_name_and_number(name: str) -> None:
    assert signal_number(name) == 15
    assert signal_name(15) == "SIGTERM"
    assert signal_name(64) in ("SIGRTMAX", "signal 64")


def test_what_is_applied_of_disk_operations_is_no_more_than_the_kernel_can_count() -> None:
    applied = Limits(read_iops=1 << 40, write_iops=5).over(Limits(read_iops=1, write_iops=2)).for_kernel()
    assert (applied.read_iops, applied.write_iops) == ((1 << 32) - 2, 5)
