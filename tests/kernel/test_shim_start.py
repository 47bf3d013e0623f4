"""Starts: told, never inferred. Each step is made to fail for real, and says its name and the kernel's errno."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from jobrunner.shim import binary_path
from jobrunner.shim.exitrecord import Cause, State, read_exit
from jobrunner.shim.launch import Report, pack_plan
from tests.support.shim import ShimJob, enter, own_cgroup, read_proc, shim_job, status_field, wait_until

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ShimJob]:
    with shim_job(tmp_path) as job:
        yield job


def failed(job: ShimJob, report: Report, step: str, error: int, detail: str = "") -> None:
    """The report is this failure; the launcher says so by its exit code, and no process is left."""
    assert (report.started, report.step, report.errno) == (False, step, error)
    assert detail in report.detail
    assert job.returncode == 1
    assert job.left() == []


def test_a_start_is_told_once_the_command_runs(job: ShimJob) -> None:
    assert job.start("sleep", "100") == Report(True)
    assert job.returncode == 0
    assert job.record().state is State.RUNNING
    assert [Path(f"/proc/{pid}/comm").read_text() for pid in job.processes()] == ["sleep\n"]


def test_the_launcher_leaves_at_once_and_the_shim_is_a_session_of_its_own(job: ShimJob) -> None:
    job.start("sleep", "100")
    shim = job.shim()
    assert os.getsid(shim) == shim
    assert os.getpgid(shim) == shim
    assert int(Path(f"/proc/{shim}/stat").read_text().rsplit(")", 1)[1].split()[1]) != os.getpid()


def test_the_shim_holds_nothing_of_the_servers(job: ShimJob, tmp_path: Path) -> None:
    with (tmp_path / "of the server").open("w") as extra:
        os.set_inheritable(extra.fileno(), True)
        items = tmp_path / "items"
        items.write_bytes(pack_plan(job.plan("sleep", "100")))
        with items.open("rb") as stdin:
            subprocess.run([binary_path()], stdin=stdin, stdout=subprocess.PIPE, close_fds=False, check=True)
    for pid in (job.shim(), job.init()):
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert not [link for link in links if "of the server" in link or link == str(items)]
    assert all(os.readlink(f"/proc/{job.shim()}/fd/{fd}") == "/dev/null" for fd in (0, 1, 2))


def test_the_list_may_come_through_a_pipe(job: ShimJob) -> None:
    items = pack_plan(job.plan("sleep", "100"))
    done = subprocess.run([binary_path()], input=items, stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (0, b"started\n")


def test_a_memfd_left_at_its_end_is_read_from_its_start(job: ShimJob) -> None:
    fd = os.memfd_create("list")
    os.write(fd, pack_plan(job.plan("sleep", "100")))
    done = subprocess.run([binary_path()], stdin=fd, stdout=subprocess.PIPE, check=False)
    os.close(fd)
    assert (done.returncode, done.stdout) == (0, b"started\n")


def test_a_launcher_that_waits_starts_nothing_until_it_is_told(job: ShimJob) -> None:
    ours, its = socket.socketpair()
    fd = os.memfd_create("list")
    with ours, its, subprocess.Popen([binary_path(), "wait"], stdin=fd, stdout=its.fileno()) as launcher:
        its.close()
        wait_until(lambda: status_field(launcher.pid, "State")[:1] == "S")
        os.write(fd, pack_plan(job.plan("sleep", "100")))
        os.close(fd)
        assert os.listdir(job.directory) == ["log"]
        ours.send(b"\n")
        assert ours.recv(100) == b"started\n"
        assert launcher.wait(timeout=20) == 0


def test_a_launcher_that_waits_leaves_with_its_server(job: ShimJob) -> None:
    ours, its = socket.socketpair()
    fd = os.memfd_create("list")
    os.write(fd, pack_plan(job.plan("sleep", "100")))
    with its, subprocess.Popen([binary_path(), "wait"], stdin=fd, stdout=its.fileno()) as launcher:
        its.close()
        ours.close()
        assert launcher.wait(timeout=20) == 1
    os.close(fd)
    assert os.listdir(job.directory) == ["log"]
    assert job.left() == []


def test_a_server_that_died_meanwhile_does_not_harm_the_job(job: ShimJob) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    items = pack_plan(job.plan("sh", "-c", "echo went on"))
    done = subprocess.run([binary_path()], input=items, stdout=writing, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert job.wait().wait_status == 0
    assert job.output() == b"went on\n"


def test_closed_standard_descriptors_are_refused_or_harmless(job: ShimJob) -> None:
    script = f"exec {binary_path()} <&- >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", script], check=False).returncode == 1


def test_step_cgroup_a_v1_cgroup_that_is_missing(job: ShimJob) -> None:
    report = job.start("true", cgroup_items=[("cgroup1-job", "/no/such/tasks")])
    failed(job, report, "cgroup", errno.ENOENT, "/no/such/tasks")


@pytest.mark.parametrize("key", ["cgroup1-shim", "cgroup1-job"])
def test_step_cgroup_a_v1_cgroup_that_cannot_be_entered(job: ShimJob, key: str) -> None:
    report = job.start("true", cgroup_items=[(key, "/dev/full")])
    failed(job, report, "cgroup", errno.ENOSPC, "/dev/full")


@pytest.mark.parametrize("key", ["cgroup2-shim", "cgroup2-job"])
def test_step_cgroup_a_v2_cgroup_that_is_missing_or_none(job: ShimJob, key: str) -> None:
    failed(job, job.start("true", cgroup_items=[(key, "/no/such")]), "cgroup", errno.ENOENT, "/no/such")
    failed(job, job.start("true", cgroup_items=[(key, "/usr")]), "cgroup", errno.EBADF, "/usr")


def test_step_cgroup_an_oom_control_that_is_none(job: ShimJob) -> None:
    failed(job, job.start("true", cgroup_items=[("oom-control", "/dev/null")]), "cgroup", errno.ENOENT, "/dev/cgroup.event_control")


def test_step_claim_whoever_made_ctl_owns_the_start_and_nothing_of_it_is_touched(job: ShimJob) -> None:
    os.mkfifo(job.directory / "ctl")
    failed(job, job.start("true"), "claim", errno.EEXIST)
    assert sorted(os.listdir(job.directory)) == ["ctl", "list", "log"]
    assert os.listdir(job.log) == []


def test_of_many_claims_at_once_exactly_one_wins(job: ShimJob) -> None:
    items = pack_plan(job.plan("sleep", "100"))
    reports: list[bytes] = []

    def launch() -> None:
        reports.append(subprocess.run([binary_path()], input=items, stdout=subprocess.PIPE, check=False).stdout)

    threads = [threading.Thread(target=launch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reports) == [f"failed claim {errno.EEXIST} \n".encode()] * 7 + [b"started\n"]
    assert len(job.processes()) == 1


@pytest.mark.requires("command:strace")
def test_step_claim_a_start_that_was_given_up_and_removed_never_happens(job: ShimJob, tmp_path: Path) -> None:
    """The server was killed, and the next one has made `ctl`, moved the directory away and removed all of it but itself."""
    helper = tmp_path / "helper"
    inject = "-e trace=renameat2 -e inject=renameat2:delay_enter=700000"
    helper.write_text(f"#!/bin/sh\nexec strace -D -f -qq -o /dev/null {inject} {binary_path()}\n")
    helper.chmod(0o755)
    items = pack_plan(job.plan("true"))
    removed = tmp_path / "removed"

    def give_up() -> None:
        wait_until(lambda: any(name.startswith(".ctl.") for name in os.listdir(job.directory)))
        job.directory.rename(removed)

    server = threading.Thread(target=give_up)
    server.start()
    failed(job, job.launch(items, helper), "claim", errno.ENOENT)
    server.join()
    assert sorted(os.listdir(removed)) == ["list", "log"]


def test_step_log_a_log_directory_that_is_missing(job: ShimJob) -> None:
    job.log.rmdir()
    failed(job, job.start("true"), "log", errno.ENOENT)


def test_step_log_a_segment_that_is_there_already(job: ShimJob) -> None:
    (job.log / f"{0:016x}").touch()
    failed(job, job.start("true"), "log", errno.EEXIST)


def test_step_pipe_no_descriptors(job: ShimJob) -> None:
    items = pack_plan(job.plan("true"))
    reports = {}
    for files in range(5, 30):  # the fewer it may open, the earlier it fails; every such failure is told as what it is
        script = f"ulimit -n {files}; exec {binary_path()}"
        done = subprocess.run(["/bin/sh", "-c", script], input=items, stdout=subprocess.PIPE, check=False)
        reports[files] = done.stdout
        if done.stdout == b"started\n":
            break
        for name in ("ctl", "exit"):
            (job.directory / name).unlink(missing_ok=True)
        for path in job.log.iterdir():
            path.unlink()
    assert reports[max(reports)] == b"started\n"
    told = [report.split() for report in list(reports.values())[:-1]]
    assert {words[0] for words in told} == {b"failed"}
    assert {int(words[2]) for words in told} == {errno.EMFILE}
    assert b"pipe" in {words[1] for words in told}


@pytest.mark.requires("cgroup:pids")
def test_step_clone_no_more_processes(job: ShimJob) -> None:
    with own_cgroup("pids") as cgroup:
        (cgroup / "pids.max").write_text("0")
        report = job.start("true", cgroup_items=[enter(cgroup, "shim")])
        failed(job, report, "clone", errno.EAGAIN, "init")


@pytest.mark.requires("cgroup:pids")
def test_step_clone_init_alone_fills_the_limit(job: ShimJob) -> None:
    with own_cgroup("pids") as cgroup:
        (cgroup / "pids.max").write_text("1")
        report = job.start("true", cgroup_items=[enter(cgroup, "job")])
        failed(job, report, "clone", errno.EAGAIN, "command")


def test_step_hostname_too_long(job: ShimJob) -> None:
    failed(job, job.start("true", hostname="h" * 65), "hostname", errno.EINVAL)


def test_step_rlimit_above_the_hard_limit(job: ShimJob) -> None:
    """One past fs.nr_open is refused to everyone (getrlimit(2))."""
    above = int(Path("/proc/sys/fs/nr_open").read_text()) + 1
    failed(job, job.start("true", open_files=above), "rlimit", errno.EPERM, "open-files")


@pytest.mark.parametrize(
    ("cwd", "error"), [("/no/such", errno.ENOENT), ("/etc/passwd", errno.ENOTDIR), ("/" + "x" * 300, errno.ENAMETOOLONG)]
)
def test_step_cwd(job: ShimJob, cwd: str, error: int) -> None:
    failed(job, job.start("true", cwd=cwd), "cwd", error, cwd[:200])


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("nosuch-command", errno.ENOENT),
        ("/no/such/command", errno.ENOENT),
        ("", errno.ENOENT),
        ("/etc/passwd", errno.EACCES),
        ("/usr", errno.EACCES),
        ("/etc/passwd/x", errno.ENOTDIR),
        ("x" * 5000, errno.ENAMETOOLONG),
    ],
)
def test_step_exec(job: ShimJob, command: str, error: int) -> None:
    failed(job, job.start(command), "exec", error)


def test_step_exec_arguments_past_the_kernels_limit(job: ShimJob) -> None:
    failed(job, job.start("true", "x" * 131072), "exec", errno.E2BIG)


def test_step_exec_an_interpreter_that_is_missing(job: ShimJob) -> None:
    script = job.directory / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    failed(job, job.start(str(script)), "exec", errno.ENOENT)


def test_a_script_without_an_interpreter_line_is_given_to_sh(job: ShimJob) -> None:
    """execvp(3) does what a shell does on ENOEXEC."""
    script = job.directory / "script"
    script.write_text("echo from sh $1\n")
    script.chmod(0o755)
    assert job.start(str(script), "arg").started
    job.wait()
    assert job.output() == b"from sh arg\n"


def test_step_exit_a_record_that_is_there_already_and_stays(job: ShimJob) -> None:
    (job.directory / "exit").write_bytes(b"another's")
    failed(job, job.shell(f"touch {job.directory}/ran"), "exit", errno.EEXIST)
    assert (job.directory / "exit").read_bytes() == b"another's"
    assert not (job.directory / "ran").exists(), "a start that failed has run nothing"


def test_step_exit_a_full_disk(job: ShimJob, tmp_path: Path) -> None:
    target = tmp_path / "small"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "none", str(target)], check=True)
    try:
        with shim_job(target) as small:
            small.directory.joinpath("list").write_bytes(b"x" * 4096)
            items = pack_plan(small.plan("true"))
            done = subprocess.run([binary_path()], input=items, stdout=subprocess.PIPE, check=False)
            assert done.stdout == f"failed exit {errno.ENOSPC} \n".encode()
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)


def frozen_launch(job: ShimJob, cgroup: Path) -> subprocess.Popen[bytes]:
    """A launch whose init is born into a frozen cgroup: a birth that hangs, as an exec from a dead file server does."""
    (cgroup / "cgroup.freeze").write_text("1")
    plan = job.plan("sleep", "100", cgroup_items=[("cgroup2-job", str(cgroup))])
    path = job.directory / "list"
    path.write_bytes(pack_plan(plan))
    with path.open("rb") as stdin:
        launcher = subprocess.Popen([binary_path()], stdin=stdin, stdout=subprocess.PIPE)
    wait_until(lambda: (cgroup / "cgroup.procs").read_text().split() != [])
    wait_until(lambda: (job.directory / "exit").exists())
    return launcher


def test_step_init_a_stop_ends_a_birth_that_hangs(job: ShimJob) -> None:
    with own_cgroup("") as cgroup:
        launcher = frozen_launch(job, cgroup)
        job.say(b"stop\n")
        said, _ = launcher.communicate(timeout=10)
    assert said == f"failed init {errno.ECANCELED} stopped before it was started\n".encode()
    assert job.left() == []
    assert job.record().state is State.FAILED


def test_step_init_an_init_that_is_killed_at_birth(job: ShimJob) -> None:
    with own_cgroup("") as cgroup:
        launcher = frozen_launch(job, cgroup)
        os.kill(int((cgroup / "cgroup.procs").read_text()), signal.SIGKILL)
        said, _ = launcher.communicate(timeout=10)
    assert said == b"failed init 0 the job's init died of signal 9\n"
    assert job.left() == []


def test_step_init_a_shim_that_is_killed_at_birth(job: ShimJob) -> None:
    with own_cgroup("") as cgroup:
        launcher = frozen_launch(job, cgroup)
        os.kill(job.shim(), signal.SIGKILL)
        said, _ = launcher.communicate(timeout=10)
        (cgroup / "cgroup.freeze").write_text("0")
        wait_until(lambda: (cgroup / "cgroup.procs").read_text() == "")
    assert said == b"failed init 0 the job's shim died of signal 9\n"


def test_a_launcher_that_is_killed_does_not_harm_the_job(job: ShimJob) -> None:
    with own_cgroup("") as cgroup:
        launcher = frozen_launch(job, cgroup)
        launcher.kill()
        launcher.communicate(timeout=10)
        (cgroup / "cgroup.freeze").write_text("0")
        wait_until(lambda: [read_proc(pid, "comm") for pid in job.processes()] == [b"sleep\n"])
        job.stop()
        assert job.wait().cause is Cause.STOPPED


def test_a_failed_start_leaves_a_record_that_says_so(job: ShimJob) -> None:
    job.start("/no/such/command")
    record = read_exit(job.directory / "exit")
    assert record is not None
    assert (record.state, record.step, record.errno, record.wait_status) == (State.FAILED, "exec", errno.ENOENT, -1)


def test_a_large_list_starts_and_is_given_back(job: ShimJob) -> None:
    env = {f"V{number}": "x" * 1000 for number in range(900)}
    job.start("sleep", "100", env=env)
    for pid in (job.shim(), job.init()):
        wait_until(partial(is_small, pid))


def is_small(pid: int) -> bool:
    """Less than 200 KiB of memory of its own."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:")) < 200
