"""Before an end is told, all that it says is on the disk: the order in which the shim asks the kernel for it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.shim import ShimJob, shim_job, status_field, wait_until
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root", "command:strace")


@contextmanager
def syncs(job: ShimJob, trace: Path) -> Iterator[list[str]]:
    """The shim's syncs from here on, each as its call and the file's name below the job's directory; there once it is left."""
    found: list[str] = []
    command = ["strace", "-f", "-y", "-qq", "-e", "trace=fsync,fdatasync", "-o", str(trace), "-p", str(job.shim())]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as strace:
        wait_until(lambda: status_field(job.shim(), "TracerPid") not in ("0", ""), at_most(20))
        yield found
        strace.wait(at_most(20))  # it ends with what it traces
    calls = re.findall(rf"(fsync|fdatasync)\(\d+<{re.escape(str(job.directory))}/?([^>]*)>", trace.read_text())
    found.extend(f"{call} {name}" for call, name in calls)


@pytest.mark.parametrize("output", ["kept", ""])
def test_the_log_is_on_the_disk_before_the_exit_record_is(tmp_path: Path, output: str) -> None:
    with shim_job(tmp_path) as job:
        go = job.directory / "go"
        job.shell(f"while ! [ -e {go} ]; do sleep 0.01; done; printf '{output}'")
        with syncs(job, tmp_path / "trace") as asked:
            go.touch()
            job.wait()
    files = [f"fdatasync log/{0:016x}", f"fdatasync log/{0:016x}.idx"] if output else []
    assert sorted(asked[: len(files)]) == files
    assert asked[len(files) :][:2] == ["fsync log", "fdatasync exit"]
