"""What a command finds when it starts: exactly what was asked for, and nothing of the host's or of the shim's."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shim import PATH, ShimJob, enter, own_cgroup, shim_job, status_field

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ShimJob]:
    with shim_job(tmp_path) as job:
        yield job


def said(job: ShimJob, script: str, **changes: object) -> str:
    end = job.run(script, **changes)  # type: ignore[arg-type]
    assert end.wait_status == 0, job.output()
    return job.output().decode()


@pytest.mark.parametrize("kind", ["pid", "mnt", "net", "ipc", "uts", "cgroup"])
def test_namespaces_are_the_jobs_own(job: ShimJob, kind: str) -> None:
    inside = said(job, f"readlink /proc/self/ns/{kind}").strip()
    assert inside.startswith(f"{kind}:[")
    assert inside != os.readlink(f"/proc/self/ns/{kind}")


def test_the_command_is_not_pid_1_and_sees_only_its_own(job: ShimJob) -> None:
    assert said(job, "echo $$; cat /proc/1/comm; cd /proc; echo [0-9]*").split() == ["2", "jobrunner-init", "1", "2"]


def test_descriptors_are_0_1_and_2(job: ShimJob) -> None:
    """The fourth is the listing's own."""
    assert said(job, "exec ls /proc/self/fd").split() == ["0", "1", "2", "3"]


def test_pid_1_holds_a_socket_its_signals_and_the_command_only(job: ShimJob) -> None:
    job.start("sleep", "100")
    init = job.init()
    links = sorted(os.readlink(f"/proc/{init}/fd/{fd}").split(":")[0] for fd in os.listdir(f"/proc/{init}/fd"))
    assert links in (["anon_inode", "anon_inode", "socket"], ["anon_inode", "pidfd", "socket"])
    assert os.readlink(f"/proc/{init}/cwd") == "/"


def test_pid_1_keeps_one_capability(job: ShimJob) -> None:
    job.start("sleep", "100")
    for name in ("CapPrm", "CapEff"):
        assert int(status_field(job.init(), name), 16) == 1 << 5  # CAP_KILL
    for name in ("CapInh", "CapAmb"):
        assert int(status_field(job.init(), name), 16) == 0


def test_standard_input_is_empty(job: ShimJob) -> None:
    assert said(job, "readlink /proc/self/fd/0; cat") == "/dev/null\n"


def test_the_environment_is_what_was_given_and_nothing_else(job: ShimJob) -> None:
    lines = said(job, "env -0 | tr '\\0' '|'", env={"A": "a b\nc", "EMPTY": ""}).split("|")
    given = {"A=a b\nc", "EMPTY=", f"PATH={PATH}", f"JOB_MARK={job.mark}"}
    assert {line for line in lines if line and not line.startswith(("PWD=", "OLDPWD=", "SHLVL=", "_="))} == given


def test_arguments_are_passed_as_they_are(job: ShimJob) -> None:
    job.start("printf", "%s|", "", " ", "a\nb", "-n", "$HOME", "*", "\udcff")
    job.wait()
    assert job.output() == b"| |a\nb|-n|$HOME|*|\xff|"


def test_the_command_is_looked_for_in_the_path_of_the_job(job: ShimJob) -> None:
    program = job.directory / "only-here"
    program.write_text("#!/bin/sh\necho found\n")
    program.chmod(0o755)
    assert job.start("only-here", env={"PATH": f"/no/such:{job.directory}"}).started
    job.wait()
    assert job.output() == b"found\n"


def test_the_working_directory_is_the_one_asked_for(job: ShimJob) -> None:
    assert said(job, "pwd -P", cwd="/usr") == "/usr\n"


def test_the_host_name_is_the_jobs(job: ShimJob) -> None:
    before = os.uname().nodename
    assert said(job, "hostname", hostname="h" * 64) == "h" * 64 + "\n"
    assert os.uname().nodename == before


def test_loopback_is_up_and_there_is_nothing_else(job: ShimJob) -> None:
    code = (
        "import fcntl, socket, struct\n"
        "print([name for _, name in socket.if_nameindex()])\n"
        "s = socket.socket(); flags = fcntl.ioctl(s, 0x8913, struct.pack('16sH14x', b'lo', 0))\n"
        "print(struct.unpack('16sH14x', flags)[1] & 1)\n"
        "l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname(), 2); print('connected')\n"
        "try: socket.create_connection(('192.0.2.1', 9), 2)\n"
        "except OSError as e: print(e.strerror)\n"
    )
    assert said(job, f'python3 -c "{code}"').splitlines() == ["['lo']", "1", "connected", "Network is unreachable"]


def test_signals_are_as_a_shell_would_have_them(job: ShimJob) -> None:
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        status = said(job, "cat /proc/self/status")
    finally:
        signal.signal(signal.SIGTERM, ignored)
    masks = {
        line.split(":")[0]: int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Sig") and line[3] != "Q"
    }
    assert {name: masks[name] for name in ("SigBlk", "SigIgn", "SigPnd")} == {"SigBlk": 0, "SigIgn": 0, "SigPnd": 0}


def test_a_command_is_a_session_of_its_own_without_a_terminal(job: ShimJob) -> None:
    assert said(job, "cut -d' ' -f5,6,7 /proc/$$/stat").split() == ["2", "2", "0"]


def test_the_rest_of_what_is_inherited_is_fixed(job: ShimJob) -> None:
    before = os.umask(0o077)
    try:
        assert said(job, "umask; ulimit -c; ulimit -Hc; cat /proc/self/oom_score_adj").split() == ["0022", "0", "0", "500"]
    finally:
        os.umask(before)


def test_open_files_are_limited(job: ShimJob) -> None:
    assert said(job, "ulimit -Sn; ulimit -Hn", open_files=64).split() == ["64", "64"]


def test_the_mounts_of_a_job_stay_in_it(job: ShimJob, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert said(job, f"mount -t tmpfs none {target} && touch {target}/inside && ls {target}") == "inside\n"
    assert list(target.iterdir()) == []


@pytest.mark.requires("cgroup:pids")
def test_the_command_is_in_its_cgroup_which_is_the_root_that_it_sees(job: ShimJob) -> None:
    with own_cgroup("pids") as cgroup:
        job.shell("cat /proc/self/cgroup; echo end; sleep 100", cgroup_items=[enter(cgroup, "job")])
        job.wait_output(b"end\n")
        members = {int(pid) for pid in (cgroup / "cgroup.procs").read_text().split()}
        assert members == {job.init(), *job.processes()}
        controllers = dict(line.split(":", 2)[1:] for line in job.output().decode().splitlines() if ":" in line)
        assert controllers["pids" if "pids" in controllers else ""] == "/"
        job.stop()
        job.wait()


def test_the_shim_is_in_its_own_cgroup_from_birth(job: ShimJob) -> None:
    with own_cgroup("") as shims, own_cgroup("") as jobs:
        job.start("sleep", "100", cgroup_items=[("cgroup2-shim", str(shims)), ("cgroup2-job", str(jobs))])
        assert (shims / "cgroup.procs").read_text().split() == [str(job.shim())]
        assert {int(pid) for pid in (jobs / "cgroup.procs").read_text().split()} == {job.init(), *job.processes()}
        job.stop()
        job.wait()
