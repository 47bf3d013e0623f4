"""Hostile jobs in the container, where the root is entered by chroot(2) and Docker's own filter is around everything.

The control of each attack is the same program beside the server: `docker exec`, as root with the container's capabilities.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.docker.stack import Cli, Stack
from tests.hostile.arena import program, series, series_told, told

SECRET = "5a1f0c3d"
SOCKET = "/tmp/hostile.sock"
LISTEN = f"""
import socket, os, time
path = socket.socket(socket.AF_UNIX); path.bind({SOCKET!r}); os.chmod({SOCKET!r}, 0o777); path.listen()
abstract = socket.socket(socket.AF_UNIX); abstract.bind("\\0hostile"); abstract.listen()
print(os.getpid(), flush=True)
time.sleep(600)
"""
DOCKERS_OWN = "refused: EPERM"
"""What Docker itself keeps from the container: no attack of ours could show more."""


@dataclass(frozen=True)
class Case:
    attack: tuple[str, ...]
    answer: str
    """The job's; an errno or a reason."""
    control: str = "succeeded"
    """How what the container's root hears begins."""

    def __str__(self) -> str:
        return " ".join(self.attack[1:3])


def cases(record: str, cgroup: str) -> list[Case]:
    """`record` is another job's directory, `cgroup` a file of the container's cgroup."""
    return [
        Case(("files", "read", "/etc/shadow", "root:"), "empty"),
        Case(("files", "read", "/certs/server.key", "PRIVATE KEY"), "ENOENT"),
        Case(("files", "read", f"{record}/job.json", SECRET), "ENOENT"),
        Case(("files", "list_directory", "/var/lib/jobrunner", "jobs"), "ENOENT"),
        Case(("files", "open_for_writing", cgroup), "EACCES"),
        Case(("files", "make_device", "/tmp"), "EPERM", DOCKERS_OWN),
        Case(("processes", "environment_of", "1"), "EACCES"),
        Case(("processes", "helper_program", "1"), "EACCES"),
        Case(("processes", "send_signal", "1"), "EPERM"),
        Case(("calls", "mount_tmpfs", "/tmp"), "EPERM"),
        Case(("calls", "unshare", "mount"), "EPERM"),
        Case(("calls", "unshare", "network"), "EPERM"),
        Case(("calls", "setns"), "EPERM"),
        Case(("calls", "chroot"), "EPERM"),
        Case(("calls", "set_host_name"), "EPERM"),
        Case(("calls", "fsopen"), "EPERM"),
        Case(("calls", "open_tree"), "EPERM"),
        Case(("calls", "unshare", "user"), "EPERM"),
        Case(("calls", "clone3_user"), "ENOSYS"),
        Case(("calls", "raw_socket", "inet"), "EPERM", DOCKERS_OWN),
        Case(("sockets", "connect_unix", SOCKET), "ENOENT"),
        Case(("sockets", "connect_unix", "@hostile"), "ECONNREFUSED"),
        Case(("sockets", "connect_tcp", "127.0.0.1", "7443"), "ECONNREFUSED"),
        Case(("roots", "climb", "/var/lib/jobrunner"), "not there"),
        Case(("roots", "break_out", "/var/lib/jobrunner"), "EPERM"),
    ]


@pytest.fixture
def listener(stack: Stack) -> Iterator[None]:
    """Beside the server, at a socket with a path and at an abstract one."""
    command = [stack.docker_command, "exec", stack.container(), "python3", "-c", LISTEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        yield
        stack.inside(f"kill {pid}; rm {SOCKET}")


def test_a_job_gets_nowhere_where_the_containers_root_does(stack: Stack, cli: Cli, listener: None) -> None:
    other = cli.start("--env", f"SECRET={SECRET}", "--label", f"secret={SECRET}", "sleep", "600")
    cgroup = stack.inside("ls -d /sys/fs/cgroup/pids/cgroup.procs /sys/fs/cgroup/cgroup.procs 2>/dev/null; true").split()[0]
    table = cases(f"/var/lib/jobrunner/jobs/{other}", cgroup)
    command = series([case.attack for case in table])
    job = series_told(cli("run", "--", *command, check=False).out)
    container = series_told(stack.docker("exec", stack.container(), *command, check=False).out)
    assert cli.info(other)["status"] == "running"
    cli("stop", "--grace", "0", other)
    assert dict(zip(map(str, table), job, strict=True)) == {str(case): f"refused: {case.answer}" for case in table}
    missed = {str(case): said for case, said in zip(table, container, strict=True) if not said.startswith(case.control)}
    assert missed == {}


def test_setuid_programs_give_nothing(stack: Stack, cli: Cli) -> None:
    attack = program("files", "run_setuid", "/usr/bin/su")
    assert told(cli("run", "--", *attack, check=False).out.encode()) == ("refused", "not root")
    container = stack.docker("exec", "--user", "12345", stack.container(), *attack, check=False).out
    assert told(container.encode()) == ("succeeded", "root")


def test_a_fork_bomb_keeps_nobody_from_anything(cli: Cli) -> None:
    bomb = cli.start("--pids", "100", "--memory", "128MiB", "--", *program("bombs", "fork_for_ever"))
    assert cli("run", "--", "echo", "served").out == "served\n"
    cli("stop", "--grace", "0", bomb)
    info = cli.info(bomb)
    assert (info["end_reason"], info["usage"]["pids_peak"]) in (("stopped", 100), ("stopped", None))


@pytest.mark.parametrize("bomb", [("memory", "256"), ("memfd", "256"), ("fill", "/dev/shm/bomb", "256")], ids=lambda bomb: bomb[0])
def test_memory_of_every_kind_is_the_jobs_own(cli: Cli, bomb: tuple[str, ...]) -> None:
    done = cli("run", "--memory", "64MiB", "--tmp-size", "512MiB", "--", *program("bombs", *bomb), check=False)
    assert done.code == 137
    assert "out of memory: the limit is 67108864 bytes" in done.err
    assert (
        told(cli("run", "--memory", "512MiB", "--tmp-size", "512MiB", "--", *program("bombs", *bomb)).out.encode())[0]
        == "succeeded"
    )
