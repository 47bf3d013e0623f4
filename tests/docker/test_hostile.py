"""Hostile jobs in the container, where the root is entered by chroot(2) and Docker's own filter is around everything.

Once by the server that compose started. There the control is the same program beside it, by `docker exec`: root, with the
capabilities of the container. Then all of tests/hostile beside it, with the controls that it has everywhere.
"""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import files

import pytest

from tests.docker.stack import ROOT, Cli, Stack
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


PACKAGES = ("pytest", "pluggy", "iniconfig", "packaging", "pygments", "pytest-asyncio", "pytest-timeout")
"""What the tests need beside the image's own; without compiled parts, so that this environment's do for the image's Python."""
THERE = "/var/lib/jobrunner/hostile"
PLACE = "/var/tmp"
SUITE = f"""
mount --bind {THERE} {PLACE}; mount -t tmpfs none /run; cd {PLACE}; ulimit -c unlimited
exec python -m pytest -p no:cacheprovider --basetemp={PLACE}/pytest --durations=5 -rs "$@"
"""
DOCKERS = (
    # Its filter answers before ours, or denies to everybody what the control needs.
    "test_filter.py",
    "test_layers.py::test_keys_of_a_uid_that_comes_again_are_out_of_reach",
    "test_layers.py::test_the_servers_keys_are_out_of_reach",
    "test_processes.py::test_the_helpers_program_is_never_written_to",
    "test_queries.py",
    # The root is by chroot(2), and read-only; /dev and /proc/sys have no more for root than for a job.
    "test_layers.py::test_the_devices_of_the_host_are_not_there",
    "test_host_tables.py::test_huge_pages_of_the_host_are_not_taken",
    "test_roots.py::test_what_holds_when_nothing_else_does[pivot_root]",
    # Programs that the image does not have: libcap's, libseccomp's, btrfs's.
    "test_simulated.py",
    "test_witnesses.py::test_capsh_finds_no_capability",
    "test_leavings.py::test_no_file_system_is_left_below_a_directory",
    # Nobody there makes a device or sets a flag.
    "test_volume_attacks.py::test_devices_and_setuid_programs_of_a_volume_are_plain_files",
    "test_volume_attacks.py::test_what_is_no_directory_is_no_volume[cache-make_device]",
    "test_volume_attacks.py::test_what_is_no_directory_is_no_volume[cache:ro-make_device]",
    "test_workspace_attacks.py::test_whatever_a_job_leaves_goes_and_nothing_else[flags]",
)
"""Tests which have no control in the container."""
WHAT = ("tests/hostile", "tests/library/test_volume_attacks.py", "tests/library/test_workspace_attacks.py")


@pytest.fixture
def checkout(stack: Stack) -> Iterator[None]:
    """tests/ and pytest, in the state volume of the server's container."""
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name in PACKAGES:
                for path in files(name) or ():
                    if path.parts[0] != ".." and path.suffix != ".pyc":
                        archive.add(path.locate(), f"site/{path}")
            for name in ("tests", "pyproject.toml"):
                archive.add(ROOT / name, name)
        file.seek(0)
        unpack = f"mkdir -m 755 {THERE}; tar -x -C {THERE}"
        subprocess.run([stack.docker_command, "exec", "-i", stack.container(), "sh", "-c", unpack], stdin=file, check=True)
    yield
    stack.inside(f"rm -rf {THERE}")


@pytest.mark.timeout(400)
def test_the_suite_holds_beside_the_server(stack: Stack, checkout: None) -> None:
    """All of tests/hostile, and what jobs try against volumes and workspaces, as root with the container's capabilities."""
    environment = {"PYTHONPATH": f"{PLACE}/site", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"JOBRUNNER_IN_CONTAINER": "1", "JOBRUNNER_MUST_RUN": "1"}
    given = [word for key, value in environment.items() for word in ("--env", f"{key}={value}")]
    what = [*WHAT, *(f"--deselect=tests/{place}/{test}" for test in DOCKERS for place in ("hostile", "library"))]
    command = [stack.docker_command, "exec", *given, stack.container(), "unshare", "--mount", "sh", "-c", SUITE, "sh", *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout + done.stderr
