"""Starts: told, never inferred. Each step is made to fail for real, and says its name and the kernel's errno."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobrunner.shim import binary_path
from jobrunner.shim.exitrecord import Cause, State, read_exit
from jobrunner.shim.items import pack_items
from jobrunner.shim.launch import Report, pack_plan
from tests.support.shim import ShimJob, enter, own_cgroup, read_proc, shim_job, wait_until

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


# -- args


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
    ("cwd", "relative"),
    ("cwd", ""),
    ("cgroup2-shim", "relative"),
    ("env", "novalue"),
    ("env", "=x"),
    ("counter", "nosuch 1 - /dev/null"),
    ("counter", "pids_peak one - /dev/null"),
    ("counter", "pids_peak 1 -"),
    ("counter", "pids_peak 1 - relative"),
    ("counter", "pids_peak 1 " + "k" * 32 + " /dev/null"),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_a_value_that_does_not_parse_is_refused_and_its_key_named(job: ShimJob, key: str, value: str) -> None:
    failed(job, job.launch(launch_items(job, (key, value))), "args", errno.EINVAL, f"bad value of {key}")


@pytest.mark.parametrize("key", ["dir", "hostname", "cwd", "merge", "stop-signal", "grace-ms", "segment-bytes", "arg"])
def test_a_mandatory_key_that_is_missing_is_named(job: ShimJob, key: str) -> None:
    failed(job, job.launch(launch_items(job, (key, None))), "args", errno.EINVAL, f"missing {key}")


@pytest.mark.parametrize("key", ["dir", "hostname", "merge", "timeout-ms"])
def test_a_key_that_is_given_twice_is_refused(job: ShimJob, key: str) -> None:
    items = launch_items(job, (key, "1" if key != "dir" else "/"), (key, "1" if key != "dir" else "/"))
    failed(job, job.launch(items), "args", errno.EINVAL, f"bad value of {key}")


def test_an_unknown_key_is_named_and_no_value_is_ever_told(job: ShimJob) -> None:
    report = job.launch(launch_items(job, ("nosuch", "secret")))
    failed(job, report, "args", errno.EINVAL, "unknown key nosuch")
    assert "secret" not in report.detail


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
    failed(job, job.launch(items), "args", errno.EINVAL)


def test_a_list_past_its_bound_is_refused(job: ShimJob) -> None:
    items = launch_items(job) + b"env=A=" + b"x" * (4 << 20) + b"\0"
    failed(job, job.launch(items), "args", errno.E2BIG)


def test_more_cgroups_than_there_are_hierarchies_are_refused(job: ShimJob) -> None:
    items = launch_items(job, *[("cgroup1-job", "/dev/null")] * 17)
    failed(job, job.launch(items), "args", errno.EINVAL, "bad value of cgroup1-job")


def test_a_report_is_one_line_whatever_is_in_it(job: ShimJob) -> None:
    job.launch(launch_items(job, ("cwd", "/no\nsuch\x7f\x01")))
    assert job.report == Report(False, "cwd", errno.ENOENT, "/no?such??")


def test_a_job_directory_that_is_missing(job: ShimJob) -> None:
    failed(job, job.launch(launch_items(job, ("dir", "/no/such"))), "args", errno.ENOENT, "/no/such")


# -- the steps in their order


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
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        anonymous = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:"))
        assert anonymous < 200, f"{pid} keeps {anonymous} KiB"
