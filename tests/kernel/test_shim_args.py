"""The item list: what is not known, does not parse or is missing is refused and named, and no value is ever told."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner.shim.items import pack_items, parse_items
from jobrunner.shim.launch import LaunchPlan, Report, pack_plan, parse_report
from tests.support.shim import ShimJob, shim_job

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ShimJob]:
    with shim_job(tmp_path) as job:
        yield job


def refused(job: ShimJob, items: bytes, error: int, detail: str = "") -> None:
    report = job.launch(items)
    assert (report.started, report.step, report.errno) == (False, "args", error)
    assert detail in report.detail
    assert sorted(path.name for path in job.directory.iterdir()) == ["list", "log"]


def launch_items(job: ShimJob, *changes: tuple[str, str | None]) -> bytes:
    """The items of a good list, one key replaced, added or (None) left out."""
    good = [item.split("=", 1) for item in pack_plan(job.plan("true")).decode().split("\0")[1:-1]]
    keys = {key for key, _ in changes}
    items = [(key, value) for key, value in good if key not in keys]
    return pack_items("jobrunner-launch", [*items, *((key, value) for key, value in changes if value is not None)])


BAD_VALUES = [
    ("merge", "2"),
    ("merge", "yes"),
    ("stop-signal", "0"),
    ("stop-signal", "65"),
    ("stop-signal", "TERM"),
    ("grace-ms", "-1"),
    ("grace-ms", ""),
    ("grace-ms", "1.5"),
    ("grace-ms", "010"),
    ("grace-ms", " 1"),
    ("grace-ms", "99999999999999999999999"),
    ("timeout-ms", "18446744073709551617"),
    ("segment-bytes", "0"),
    ("open-files", "9223372036854775808"),
    ("processes", "1"),
    ("user-namespace", "2"),
    ("cwd", "relative"),
    ("cwd", ""),
    ("cgroup2-shim", "relative"),
    ("show", "/"),
    ("show", "relative"),
    ("show", "/a/../b"),
    ("show", "/a/"),
    ("mask", "//a"),
    ("cgroup-view", "memory"),
    ("cgroup-view", "../x /sys"),
    ("volume", "rx - /volumes/a /b"),
    ("volume", "rw 1 /volumes/a /b"),
    ("volume", "rw 1:x /volumes/a /b"),
    ("volume", "rw - volumes/a /b"),
    ("volume", "rw - /volumes/a b"),
    ("volume", "rw - /volumes/a"),
    ("uid", "4294967295"),
    ("network", "bridge"),
    ("protect", "everything"),
    ("seccomp", ""),
    ("seccomp", "00"),
    ("seccomp", "0" * 15 + "G"),
    ("tmp-size", "1"),
    ("env", "novalue"),
    ("env", "=x"),
    ("counter", "nosuch 1 - /dev/null"),
    ("network", "bridge"),
    ("counter", "pids_peak one - /dev/null"),
    ("counter", "pids_peak 1 -"),
    ("counter", "pids_peak 1 - relative"),
    ("counter", "pids_peak 1 " + "k" * 32 + " /dev/null"),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_a_value_that_does_not_parse_is_refused_and_its_key_named(job: ShimJob, key: str, value: str) -> None:
    refused(job, launch_items(job, (key, value)), errno.EINVAL, f"bad value of {key}")


@pytest.mark.parametrize("key", ["dir", "hostname", "cwd", "merge", "stop-signal", "grace-ms", "segment-bytes", "arg"])
def test_a_mandatory_key_that_is_missing_is_named(job: ShimJob, key: str) -> None:
    refused(job, launch_items(job, (key, None)), errno.EINVAL, f"missing {key}")


@pytest.mark.parametrize("key", ["dir", "hostname", "merge", "timeout-ms"])
def test_a_key_that_is_given_twice_is_refused(job: ShimJob, key: str) -> None:
    items = launch_items(job, (key, "1" if key != "dir" else "/"), (key, "1" if key != "dir" else "/"))
    refused(job, items, errno.EINVAL, f"bad value of {key}")


def test_a_user_namespace_needs_an_id_to_map(job: ShimJob) -> None:
    refused(job, launch_items(job, ("user-namespace", "1")), errno.EINVAL, "missing uid")


def test_an_unknown_key_is_named_and_no_value_is_ever_told(job: ShimJob) -> None:
    refused(job, launch_items(job, ("nosuch", "secret")), errno.EINVAL, "unknown key nosuch")
    refused(job, launch_items(job, ("env", "secret")), errno.EINVAL, "bad value of env")
    assert "secret" not in job.report.detail


@pytest.mark.parametrize(
    "items",
    [
        b"",
        b"\0",
        b"garbage",
        b"jobrunner-launch=1",
        b"jobrunner-launch=2\0",
        b"jobrunner-stop=1\0",
        b"\0" * 4096,
        b"jobrunner-launch=1\0dir=/x",
    ],
)
def test_what_is_no_list_is_refused(job: ShimJob, items: bytes) -> None:
    refused(job, items, errno.EINVAL)


def test_a_list_past_its_bound_is_refused(job: ShimJob) -> None:
    items = launch_items(job) + b"env=A=" + b"x" * (4 << 20) + b"\0"
    refused(job, items, errno.E2BIG)


def test_more_cgroups_than_there_are_hierarchies_are_refused(job: ShimJob) -> None:
    items = launch_items(job, *[("cgroup1-job", "/dev/null")] * 17)
    refused(job, items, errno.EINVAL, "bad value of cgroup1-job")


def test_a_report_is_one_line_whatever_is_in_it(job: ShimJob) -> None:
    job.launch(launch_items(job, ("cwd", "/no\nsuch\x7f\x01")))
    assert job.report == Report(False, "cwd", errno.ENOENT, "/no?such??")


def test_a_job_directory_that_is_missing(job: ShimJob) -> None:
    refused(job, launch_items(job, ("dir", "/no/such")), errno.ENOENT, "/no/such")


# -- the same, seen from Python


def test_a_value_with_a_nul_would_be_two_items_and_is_an_error() -> None:
    with pytest.raises(ValueError, match="NUL"):
        pack_plan(LaunchPlan(directory="/d", command=["x\0arg=y"], env={}, hostname="h"))


def test_items_survive_packing() -> None:
    items = [("a", ""), ("b", "x=y"), ("b", "\udcff ü")]
    assert parse_items("kind", pack_items("kind", items)) == items


@pytest.mark.parametrize(
    ("line", "report"),
    [
        (b"started\n", Report(True)),
        (b"failed exec 2 \n", Report(False, "exec", 2, "")),
        (b"failed cwd 20 /a b\n", Report(False, "cwd", 20, "/a b")),
        (b"", None),
        (b"started", None),
        (b"started\nstarted\n", None),
    ],
)
def test_a_report_is_read(line: bytes, report: Report) -> None:
    assert parse_report(line) == report
