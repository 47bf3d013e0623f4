"""Endings: what the exit record says is what happened."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from jobrunner.shim.exitrecord import Cause, ExitRecord, State, parse_exit, read_exit
from tests.support.shim import END, ShimJob, enter, own_cgroup, pack_exit, removed, shim_job, wait_gone, wait_until

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ShimJob]:
    with shim_job(tmp_path) as job:
        yield job


def test_every_exit_code_is_told(tmp_path: Path) -> None:
    jobs = [ShimJob(tmp_path / str(code)) for code in range(256)]
    for code, job in enumerate(jobs):
        assert job.shell(f"exit {code}").started
    ends = [job.wait() for job in jobs]
    assert [(end.state, end.cause, end.wait_status) for end in ends] == [(State.ENDED, Cause.OWN, code << 8) for code in range(256)]


SIGNALS = [
    "HUP",
    "INT",
    "QUIT",
    "ILL",
    "TRAP",
    "ABRT",
    "BUS",
    "FPE",
    "KILL",
    "USR1",
    "SEGV",
    "USR2",
    "PIPE",
    "ALRM",
    "TERM",
    "XCPU",
    "SYS",
]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_of_the_jobs_own_is_told(job: ShimJob, name: str) -> None:
    end = job.run(f"kill -{name} $$")
    assert (end.cause, end.wait_status) == (Cause.OWN, getattr(signal, f"SIG{name}"))


def test_a_record_tells_when_and_how_long(job: ShimJob) -> None:
    before = time.time_ns()
    end = job.run("printf 12345; printf 678 >&2; sleep 0.1")
    assert before <= end.started_ns <= end.ended_ns <= time.time_ns()
    assert 100_000_000 <= end.wall_ns <= end.ended_ns - before
    assert (end.log_end, end.lost, end.step, end.errno) == (8, 0, "", 0)


def test_a_running_job_has_a_record_that_says_so_and_when_it_started(job: ShimJob) -> None:
    job.start("sleep", "100")
    running = job.record()
    assert (running.state, running.cause, running.wait_status) == (State.RUNNING, Cause.NONE, -1)
    job.stop()
    assert job.wait().started_ns == running.started_ns


def test_end_comes_after_the_record(job: ShimJob) -> None:
    job.run("echo x")
    assert [record.kind for record in job.records()][-1] == END
    assert job.records()[-1].time_ns >= job.record().ended_ns


def test_a_record_with_one_bit_wrong_is_none(job: ShimJob) -> None:
    job.run("true")
    raw = (job.directory / "exit").read_bytes()
    assert len(raw) == 512
    for position in range(512):
        broken = bytearray(raw)
        broken[position] ^= 1
        assert parse_exit(bytes(broken)) is None


@pytest.mark.parametrize("raw", [b"", b"x", b"\0" * 512, b"\0" * 1024])
def test_what_is_no_record_is_none(raw: bytes) -> None:
    assert parse_exit(raw) is None


def test_a_missing_record_is_none(tmp_path: Path) -> None:
    assert read_exit(tmp_path / "exit") is None


def test_python_reads_what_python_packs(job: ShimJob) -> None:
    end = replace(job.run("exit 3"), cpu_user_ns=5, oom_kills=0, step="exec", errno=2)
    assert parse_exit(pack_exit(end)) == end


def test_python_packs_what_the_shim_writes(job: ShimJob) -> None:
    end = job.run("exit 3")
    assert pack_exit(end) == (job.directory / "exit").read_bytes()


# -- counters


def counted(job: ShimJob, tmp_path: Path, counter: str, content: str) -> ExitRecord:
    path = tmp_path / "counter file"
    path.write_text(content)
    assert job.start("true", cgroup_items=[("counter", f"{counter} {path}")]).started
    return job.wait()


@pytest.mark.parametrize(
    ("counter", "content", "value"),
    [
        ("pids_peak 1 -", "17\n", 17),
        ("pids_peak 1 -", "  17 18", 17),
        ("pids_peak 1000 -", "17\n", 17000),
        ("pids_peak 1 -", "max\n", None),
        ("pids_peak 1 -", "", None),
        ("pids_peak 1 oom_kill", "oom 1\noom_kill 4\n", 4),
        ("pids_peak 1 rbytes", "8:0 rbytes=10 wbytes=3\n8:16 rbytes=32 wbytes=4\n", 42),
        ("pids_peak 1 Read", "8:0 Read 1\n8:0 Write 2\n8:16 Read 3\nTotal 6\n", 4),
        ("pids_peak 1 Read", "8:0 Write 2\n", None),
        ("pids_peak 1 Read", "8:0 Read\n", None),
        ("pids_peak 1 Rea", "8:0 Read 1\n", None),
        ("pids_peak 1 x", "x 18446744073709551615\n", None),
    ],
)
def test_a_counter_is_read_as_its_item_says(job: ShimJob, tmp_path: Path, counter: str, content: str, value: int | None) -> None:
    assert counted(job, tmp_path, counter, content).pids_peak == value


def test_a_counter_whose_file_is_missing_is_unknown(job: ShimJob) -> None:
    job.start("true", cgroup_items=[("counter", "pids_peak 1 - /no/such/file")])
    assert job.wait().pids_peak is None


def test_each_counter_has_its_field(job: ShimJob, tmp_path: Path) -> None:
    names = ["cpu_user_ns", "cpu_system_ns", "memory_peak", "pids_peak", "read_bytes", "write_bytes", "read_ops", "write_ops"]
    names += ["throttled_ns", "oom_kills"]
    items = []
    for number, name in enumerate(names):
        (tmp_path / name).write_text(str(number))
        items.append(("counter", f"{name} 1 - {tmp_path / name}"))
    job.start("true", cgroup_items=items)
    end = job.wait()
    assert [getattr(end, name) for name in names] == list(range(10))


def test_counters_are_those_of_the_end(job: ShimJob, tmp_path: Path) -> None:
    path = tmp_path / "counter"
    path.write_text("1")
    job.shell(f"echo 2 > {path}", cgroup_items=[("counter", f"pids_peak 1 - {path}")])
    assert job.wait().pids_peak == 2


# -- out of memory, cgroup v1


def oom_items(cgroup: Path) -> list[tuple[str, str]]:
    control = cgroup / "memory.oom_control"
    return [enter(cgroup, "job"), ("oom-control", str(control)), ("counter", f"oom_kills 1 oom_kill {control}")]


EAT = f"{sys.executable} -c \"x = b'x' * (64 << 20)\""


@pytest.mark.requires("cgroup:memory")
def test_an_oom_kill_ends_the_whole_job_and_is_told(job: ShimJob) -> None:
    with own_cgroup("memory") as cgroup:
        (cgroup / "memory.limit_in_bytes").write_text(str(32 << 20))
        job.shell(f"{EAT}; sleep 0.5; echo went on", cgroup_items=oom_items(cgroup))
        end = job.wait()
    assert (end.cause, end.oom_kills) == (Cause.OOM_KILLED, 1)
    assert b"went on" not in job.output()  # a quick shell may still say `Killed`


@pytest.mark.requires("cgroup:memory")
def test_a_command_that_is_the_victim_itself_is_oom_killed(job: ShimJob) -> None:
    with own_cgroup("memory") as cgroup:
        (cgroup / "memory.limit_in_bytes").write_text(str(32 << 20))
        job.shell(f"exec {EAT}", cgroup_items=oom_items(cgroup))
        end = job.wait()
    assert (end.cause, end.wait_status) == (Cause.OOM_KILLED, signal.SIGKILL)


@pytest.mark.requires("cgroup:memory")
def test_a_job_is_not_ended_because_its_neighbour_was_out_of_memory(tmp_path: Path) -> None:
    """The kernel's event comes to every cgroup below the one that is out of memory."""
    with own_cgroup("memory") as parent, shim_job(tmp_path) as eater, shim_job(tmp_path) as bystander:
        (parent / "memory.use_hierarchy").write_text("1")
        (parent / "memory.limit_in_bytes").write_text(str(32 << 20))
        cgroups = [parent / "eater", parent / "bystander"]
        for cgroup in cgroups:
            cgroup.mkdir()
        bystander.shell("echo up; sleep 100", cgroup_items=oom_items(cgroups[1]))
        eater.shell(EAT, cgroup_items=oom_items(cgroups[0]))
        assert eater.wait().cause is Cause.OOM_KILLED
        time.sleep(1.2)  # longer than the shim looks at its counter after an event
        assert bystander.record().state is State.RUNNING
        bystander.stop()
        assert bystander.wait().cause is Cause.STOPPED
        for cgroup in cgroups:
            wait_until(partial(removed, cgroup))


# -- nobody outlives the job


ESCAPES = {
    "background child": "sleep 1000 & exit 0",
    "double fork": "( ( sleep 1000 & ) & ); exit 0",
    "setsid": "setsid sleep 1000 & sleep 0.05; exit 0",
    "closed output": "sleep 1000 >/dev/null 2>&1 & exit 0",
    "signals ignored": "trap '' TERM HUP INT; sleep 1000 & exit 0",
    "stopped": "sleep 1000 & kill -STOP $!; exit 0",
    "many": "for i in $(seq 200); do sleep 1000 & done; exit 0",
}


@pytest.mark.parametrize("name", list(ESCAPES))
def test_no_process_outlives_the_command(job: ShimJob, name: str) -> None:
    end = job.run(ESCAPES[name], seconds=5)
    assert (end.cause, end.wait_status) == (Cause.OWN, 0)
    assert job.left() == []


def test_the_job_dies_with_a_shim_that_is_killed(job: ShimJob) -> None:
    job.shell("setsid sleep 100 & sleep 100 & wait")
    wait_until(lambda: len(job.processes()) == 3)
    everyone = [job.init(), *job.processes()]
    os.kill(job.shim(), signal.SIGKILL)
    wait_gone(everyone)
    with pytest.raises(OSError, match="No such device"):
        os.open(job.directory / "ctl", os.O_WRONLY | os.O_NONBLOCK)
    assert job.record().state is State.RUNNING, "nobody was left to say how it ended"


def test_an_init_that_hears_nothing_dies_with_its_shim(job: ShimJob) -> None:
    job.shell("sleep 100 & sleep 100")
    wait_until(lambda: len(job.processes()) == 3)
    everyone = [job.init(), *job.processes()]
    os.kill(job.init(), signal.SIGSTOP)
    os.kill(job.shim(), signal.SIGKILL)
    wait_gone(everyone)


def test_a_shim_that_is_killed_hangs_up_ctl_at_once(job: ShimJob) -> None:
    job.start("sleep", "100")
    shim = job.shim()
    os.kill(shim, signal.SIGKILL)
    job.wait(5)


def test_a_job_whose_init_is_killed_from_outside_is_lost(job: ShimJob) -> None:
    job.shell("sleep 100 & sleep 100 & wait")
    os.kill(job.init(), signal.SIGKILL)
    end = job.wait()
    assert (end.state, end.cause, end.wait_status) == (State.ENDED, Cause.LOST, -1)
    assert job.left() == []


def test_a_command_that_is_killed_from_outside_ended_by_that_signal(job: ShimJob) -> None:
    job.start("sleep", "100")
    os.kill(job.processes()[0], signal.SIGKILL)
    end = job.wait()
    assert (end.cause, end.wait_status) == (Cause.OWN, signal.SIGKILL)


def test_signals_to_the_shim_do_not_end_it(job: ShimJob) -> None:
    job.start("sleep", "100")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT, signal.SIGUSR1):
        os.kill(job.shim(), number)
    job.stop()
    assert job.wait().cause is Cause.STOPPED


def test_nothing_is_mounted_on_the_host(job: ShimJob) -> None:
    before = mounts(job)
    job.shell("sleep 100")
    assert mounts(job) == before
    job.stop()
    job.wait()
    assert mounts(job) == before


def mounts(job: ShimJob) -> list[str]:
    """All of this process's, but those in temporary directories of others: proc_pid_mountinfo(5)."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if not line.split()[4].startswith(tempfile.gettempdir()) or str(job.directory) in line]
