"""A real shim in a directory of its own, without a server: start it, talk to it, and read what it leaves.

A job's processes are found by a variable that only its environment has, a job's shim and init by the shim's working directory.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jobrunner.shim import binary_path
from jobrunner.shim.exitrecord import LAYOUT, MAGIC, UNKNOWN, VERSION, ExitRecord, read_exit
from jobrunner.shim.launch import LaunchPlan, Report, pack_plan, parse_report
from jobrunner.shim.stopfile import StopRequest, pack_stop

INDEX = struct.Struct("<QqIIQ")
DATA, GAP, END = 1, 2, 3
STDOUT, STDERR = 1, 2
PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """One record of a segment's index, and the segment's first offset."""

    base: int
    end: int
    time_ns: int
    kind: int
    stream: int
    lost: int


class ShimJob:
    """One job directory; `start` launches it, everything else looks at what has become of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.mark = uuid.uuid4().hex
        self.report = Report(False)
        self.returncode = -1
        self.log.mkdir(parents=True)

    def plan(self, *command: str, **changes: Any) -> LaunchPlan:
        env = {"PATH": PATH, "JOB_MARK": self.mark} | changes.pop("env", {})
        return LaunchPlan(directory=str(self.directory), command=command, env=env, **{"hostname": "testjob", **changes})

    def start(self, *command: str, **changes: Any) -> Report:
        """Launch this command with these changes to the plan; the launcher's report."""
        return self.launch(pack_plan(self.plan(*command, **changes)))

    def shell(self, script: str, **changes: Any) -> Report:
        return self.start("/bin/sh", "-c", script, **changes)

    def launch(self, items: bytes, binary: Path | None = None) -> Report:
        done = run_launcher(items, self.directory, binary)
        self.returncode = done.returncode
        report = parse_report(done.stdout)
        assert report is not None, f"the helper died: {done}"
        self.report = report
        return report

    def run(self, script: str, seconds: float = 20, **changes: Any) -> ExitRecord:
        """Start a shell script and wait for its end."""
        report = self.shell(script, **changes)
        assert report.started, report
        return self.wait(seconds)

    def wait(self, seconds: float = 20) -> ExitRecord:
        """Wait until the shim is gone, as the server does: by the hang-up of `ctl` (fifo(7))."""
        try:
            fd = os.open(self.directory / "ctl", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # ENXIO: it is gone already
            return self.record()
        try:
            poll = select.poll()
            poll.register(fd, 0)
            assert poll.poll(seconds * 1000), f"the shim still lives after {seconds} s"
        finally:
            os.close(fd)
        return self.record()

    def record(self) -> ExitRecord:
        record = read_exit(self.directory / "exit")
        assert record is not None
        return record

    def write_stop(self, grace: float, signal: int = 15, reason: str = "stopped") -> None:
        request = StopRequest(reason=reason, signal=signal, grace=grace, by="tester")
        new = self.directory / ".stop.new"
        new.write_bytes(pack_stop(request))
        new.rename(self.directory / "stop")

    def say(self, line: bytes) -> None:
        with suppress(OSError):  # ENXIO, EPIPE: the shim is gone
            fd = os.open(self.directory / "ctl", os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(fd, line)
            finally:
                os.close(fd)

    def stop(self, grace: float = 10.0, signal: int = 15, reason: str = "stopped") -> None:
        self.write_stop(grace, signal, reason)
        self.say(b"stop\n")

    def segments(self) -> list[int]:
        return sorted(int(path.name, 16) for path in self.log.iterdir() if len(path.name) == 16)

    def records(self) -> list[IndexRecord]:
        """All whole index records, in order."""
        found = []
        for base in self.segments():
            raw = (self.log / f"{base:016x}.idx").read_bytes()
            before = base
            for at in range(0, len(raw) - len(raw) % INDEX.size, INDEX.size):
                end, moment, kind, stream, lost = INDEX.unpack_from(raw, at)
                if kind != GAP:
                    assert lost == (end - before) | zlib.crc32(raw[at : at + 28]) << 32, "size and checksum"
                found.append(IndexRecord(base, end, moment, kind, stream, lost if kind == GAP else 0))
                before = end
        return found

    def output(self, stream: int = 0) -> bytes:
        """The bytes of one stream, or of both as they were read, from what the index covers."""
        parts = []
        position, base = 0, -1
        data = b""
        for record in self.records():
            if record.base != base:
                base = position = record.base
                data = (self.log / f"{base:016x}").read_bytes()
            if record.kind == DATA and stream in (0, record.stream):
                part = data[position - base : record.end - base]
                assert len(part) == record.end - position, "the index covers bytes that are not there"
                parts.append(part)
            position = record.end
        return b"".join(parts)

    def wait_output(self, wanted: bytes, seconds: float = 20) -> None:
        """Until the log has these bytes."""
        deadline = time.monotonic() + seconds
        while wanted not in self.output():
            assert time.monotonic() < deadline, f"no {wanted!r} in {self.output()!r}"
            time.sleep(0.005)

    def processes(self) -> list[int]:
        """Processes that were executed with this job's environment."""
        return [pid for pid in all_pids() if self.mark.encode() in read_proc(pid, "environ")]

    def shim(self) -> int:
        """The process of the shim; AssertionError if there is none."""
        here = [pid for pid in all_pids() if link_of(pid, "cwd") == str(self.directory)]
        outside = [pid for pid in here if len(status_field(pid, "NSpid").split()) == 1]
        assert len(outside) == 1, here
        return outside[0]

    def init(self) -> int:
        children = read_proc(self.shim(), f"task/{self.shim()}/children").split()
        assert len(children) == 1, children
        return int(children[0])

    def left(self) -> list[int]:
        """Processes of any kind that have to do with this job."""
        here = [pid for pid in all_pids() if link_of(pid, "cwd").startswith(str(self.directory))]
        return sorted({*here, *self.processes()})

    def clean(self) -> None:
        """End it if a test has not: the shim is killed, and init dies of it."""
        with suppress(AssertionError, ProcessLookupError):
            os.kill(self.shim(), signal.SIGKILL)


def run_launcher(items: bytes, directory: Path, binary: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    """The launcher with this list as its standard input."""
    path = directory / "list"
    path.write_bytes(items)
    with path.open("rb") as stdin:
        return subprocess.run([binary or binary_path()], stdin=stdin, capture_output=True, cwd="/", env={}, timeout=30, check=False)


@contextmanager
def shim_job(directory: Path) -> Iterator[ShimJob]:
    """A job directory below this one; whatever is left of the job is ended."""
    job = ShimJob(directory / f"job-{uuid.uuid4().hex[:8]}")
    try:
        yield job
    finally:
        job.clean()


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def read_proc(pid: int, name: str) -> bytes:
    """A file of /proc/<pid>, empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def link_of(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/{name}")
    except OSError:
        return ""


def status_field(pid: int, name: str) -> str:
    """A line of /proc/<pid>/status (proc(5))."""
    lines = read_proc(pid, "status").decode().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:")), "")


@contextmanager
def traced(pid: int, inject: str) -> Iterator[None]:
    """strace on this process, which does to a system call of it what `inject` says (strace(1), --inject)."""
    nowhere = subprocess.DEVNULL
    what = ("-e", f"trace={inject.partition(':')[0]}", "-e", f"inject={inject}")
    command = ["strace", "-qq", "-o", "/dev/null", *what, "-p", str(pid)]
    with subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere) as strace:
        try:
            wait_until(lambda: status_field(pid, "TracerPid") not in ("0", ""), 20)
            yield
        finally:
            strace.terminate()


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Until this is so; for what the kernel tells by no event."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to be"
        time.sleep(0.002)


@contextmanager
def own_cgroup(controller: str) -> Iterator[Path]:
    """A fresh cgroup that has this controller, v1 or v2; "" is a v2 cgroup. Killed and removed afterwards."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    v1 = [Path(words[1]) for words in mounts if words[2] == "cgroup" and controller in words[3].split(",")]
    v2 = [Path(words[1]) for words in mounts if words[2] == "cgroup2"]
    if not v1 and controller:
        (v2[0] / "cgroup.subtree_control").write_text(f"+{controller}")
    cgroup = (v1 or v2)[0] / f"jobrunner-test-{uuid.uuid4().hex[:8]}"
    cgroup.mkdir()
    try:
        yield cgroup
    finally:
        for pid in (cgroup / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        if (cgroup / "cgroup.freeze").exists():
            (cgroup / "cgroup.freeze").write_text("0")
        wait_until(lambda: removed(cgroup))


def removed(cgroup: Path) -> bool:
    """Remove a cgroup; False if it is still busy."""
    try:
        cgroup.rmdir()
    except OSError:  # EBUSY for a moment after its last process
        return False
    return True


def enter(cgroup: Path, who: str) -> tuple[str, str]:
    """The item that brings `shim` or `job` into a cgroup of `own_cgroup`."""
    return (f"cgroup1-{who}", str(cgroup / "tasks")) if (cgroup / "tasks").exists() else (f"cgroup2-{who}", str(cgroup))


def wait_gone(pids: list[int], seconds: float = 5) -> None:
    """Until none of these processes is alive; one that its parent has not reaped yet is not."""
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if status_field(pid, "State")[:1] not in ("", "Z", "X")]:
        assert time.monotonic() < deadline, f"{alive} still live"
        time.sleep(0.005)


def pack_exit(record: ExitRecord) -> bytes:
    """An exit record as a shim writes it."""
    values = [getattr(record, field.name) for field in fields(record)]
    state, cause, status, errno, step, *numbers = values
    counters = [UNKNOWN if number is None else number for number in numbers[5:]]
    body = LAYOUT.pack(MAGIC, VERSION, state, cause, status, errno, step.encode(), *numbers[:5], *counters, 0)[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")
