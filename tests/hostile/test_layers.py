"""Every protection holds by itself.

Each attack names the protections that stop it, and the error that each gives when all the others of them are left out. With all of
them left out it succeeds: so neither the attack nor the list is wrong. Attacks that leave out the same ones are tried in one job.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from jobrunner.sandbox import SHOW
from tests.hostile.arena import Arena, open_arena, series, series_told
from tests.hostile.inside.base import LIBC, check
from tests.support.runner import output
from tests.support.timing import at_most, fail_after

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.requires("root", "command:python3")]

NO_RIGHT = {"uid": "EPERM", "capabilities": "EPERM"}
"""Root of the host would still have no capability, and somebody else has none anyway."""
DENIED = {**NO_RIGHT, "seccomp": "EPERM"}
FILTERED = {"seccomp": "EPERM"}
"""What anybody may do: nothing but the filter is in the way."""
NOT_OURS = {"uid": "EACCES", "capabilities": "EACCES"}
REBOOT, SWAPON, ACCT, SYSLOG, DELETE_MODULE, FINIT_MODULE, SETTIMEOFDAY = 169, 167, 163, 103, 176, 313, 164
UNMAPPED = "8"
IN_CONTAINER = os.environ.get("JOBRUNNER_IN_CONTAINER") == "1"
DOCKERS_OWN = {
    *("pivot_root", "userfaultfd", "hog_keys-20", "file_setattr-.work", "forge_end-1"),
    *(f"reach-{call}" for call in ("103-10-0-0", "163-8", "164-8-0", "167-8-0", "169-0-0-0", "176-8-0", "313--1-8-0")),
    *("make_device-.tmp", "raw_socket-inet", "raw_socket-packet"),
    *(f"{attack}-1" for attack in ("peek", "root_of", "helper_program", "compare", "namespace_of")),
    "create-.usr.hostile",
}
"""What the container denies to everybody, so that it is refused whatever is left out: by Docker's filter, by its read-only root,
and for want of MKNOD, NET_RAW and SYS_PTRACE."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    attack: tuple[str, ...]
    stopped_by: Mapping[str, str]
    since: tuple[int, int] = (0, 0)
    """The first Linux that has what is attacked."""

    def __str__(self) -> str:
        return "-".join(word.replace("/", ".") for word in self.attack[1:])

    def answers(self) -> dict[frozenset[str], str]:
        """How what it hears begins: with all protections, without all but one of its own, and without any of these."""
        layers = frozenset(self.stopped_by)
        if IN_CONTAINER and str(self) in DOCKERS_OWN:
            return dict.fromkeys([frozenset(), *(layers - {layer} for layer in layers), layers], "refused")
        alone = {layers - {layer}: f"refused: {why}" for layer, why in self.stopped_by.items()}
        return {frozenset(): "refused", **alone, layers: "succeeded"}


CASES = [
    Case(("files", "read", "/etc/shadow", "root:"), {"mask": "empty", "uid": "EACCES"}),
    Case(("files", "read", "/proc/keys"), {"proc": "empty"}),
    Case(("files", "open_for_writing", "/proc/sys/kernel/core_pattern"), {"proc": "EROFS", "uid": "EACCES"}),
    Case(("files", "create", "/usr/hostile"), {"root": "EROFS", "uid": "EACCES"}),
    Case(("files", "make_device", "/tmp"), {"root": "EACCES", **NO_RIGHT}),
    Case(("calls", "mount_tmpfs", "/tmp"), DENIED),
    Case(("calls", "remount_writable", "/usr"), DENIED),
    Case(("calls", "mount_setattr", "/usr"), DENIED),
    Case(("calls", "unmount", "/etc/shadow"), DENIED),
    Case(("calls", "fsopen"), DENIED),
    Case(("calls", "open_tree"), DENIED),
    Case(("calls", "unshare", "mount"), NO_RIGHT),
    Case(("calls", "setns"), DENIED),
    Case(("calls", "pivot_root"), DENIED),
    Case(("calls", "chroot"), DENIED),
    Case(("calls", "set_host_name"), DENIED),
    Case(("calls", "reach", f"{REBOOT}", "0", "0", "0"), DENIED),
    Case(("calls", "reach", f"{SWAPON}", UNMAPPED, "0"), DENIED),
    Case(("calls", "reach", f"{ACCT}", UNMAPPED), DENIED),
    Case(("calls", "reach", f"{SYSLOG}", "10", "0", "0"), DENIED),
    Case(("calls", "reach", f"{SETTIMEOFDAY}", UNMAPPED, "0"), FILTERED),
    Case(("calls", "raw_socket", "inet"), NO_RIGHT),
    Case(("calls", "raw_socket", "packet"), {**NO_RIGHT, "seccomp": "EAFNOSUPPORT"}),
    Case(("calls", "open_socket", "AF_VSOCK"), {"seccomp": "EAFNOSUPPORT"}),
    Case(("calls", "bpf_map"), DENIED),
    Case(("calls", "unshare", "user"), FILTERED),
    Case(("calls", "clone_user"), FILTERED),
    Case(("calls", "clone3_user"), {"seccomp": "ENOSYS"}),
    Case(("calls", "io_uring"), FILTERED),
    Case(("calls", "userfaultfd"), FILTERED),
    Case(("calls", "type_into_terminal"), FILTERED),
    Case(("calls", "set_line_discipline"), FILTERED),
    Case(("calls", "netlink_socket", "2"), {"seccomp": "EPROTONOSUPPORT"}),
    Case(("filters", "attach", "26"), FILTERED),
    Case(("filters", "keep"), {"seccomp": "EINVAL"}),
    Case(("projects", "set_flags", "/work"), FILTERED),
    Case(("projects", "set_flags", "/work", "1"), FILTERED),
    Case(("projects", "set_attributes", "/work"), FILTERED),
    Case(("projects", "file_setattr", "/work"), FILTERED, since=(6, 17)),
    Case(("bombs", "hog_keys", "20"), FILTERED),
    Case(("foreign", "int80"), FILTERED),
    Case(("foreign", "int80_unshare"), FILTERED),
    Case(("processes", "peek", "1"), NOT_OURS),
    Case(("processes", "environment_of", "1"), NOT_OURS),
    Case(("processes", "root_of", "1"), NOT_OURS),
    Case(("processes", "helper_program", "1"), NOT_OURS),
    Case(("processes", "compare", "1"), NO_RIGHT),
    Case(("queries", "namespace_of", "1"), NOT_OURS, since=(6, 11)),
]


if Path("/proc/modules").exists():  # a kernel without modules has no such calls
    CASES += [
        Case(("calls", "reach", f"{DELETE_MODULE}", UNMAPPED, "0"), DENIED),
        Case(("calls", "reach", f"{FINIT_MODULE}", "-1", UNMAPPED, "0"), DENIED),
    ]


HERE = tuple(int(number) for number in platform.release().split(".")[:2])
CASES = [case for case in CASES if case.since <= HERE]
LEFT_OUT = sorted({left_out for case in CASES for left_out in case.answers()}, key=sorted)


@pytest.mark.parametrize("left_out", LEFT_OUT, ids=lambda names: "+".join(sorted(names)) or "nothing")
async def test_each_protection_alone_stops(arena: Arena, left_out: frozenset[str]) -> None:
    expected = {case: case.answers()[left_out] for case in CASES if left_out in case.answers()}
    said = await at_once(arena, list(expected), without=left_out)
    assert {str(case): said[case] for case, answer in expected.items() if not said[case].startswith(answer)} == {}


async def test_a_root_that_can_be_written_to_opens_nothing_else(arena: Arena) -> None:
    said = await at_once(arena, CASES, writable=True)
    assert {str(case) for case, answer in said.items() if not answer.startswith("refused")} == {"create-.usr.hostile"}
    assert not Path("/usr/hostile").exists()


async def at_once(arena: Arena, cases: Sequence[Case], **how: Any) -> dict[Case, str]:
    """What each says, in one job."""
    with fail_after(60):
        job = await arena.start(*series([case.attack for case in cases]), **how)
        said = series_told((await output(job, seconds=at_most(60))).decode())
        assert (await job.wait()).status == "completed"
    await arena.heartbeat()
    return dict(zip(cases, said, strict=True))


async def hold(arena: Arena, case: Case, **how: Any) -> None:
    """The same of one attack that needs more, in a job for each."""
    for left_out, answer in case.answers().items():
        outcome = await arena.attack(*case.attack, without=left_out, **how)
        assert outcome.text.startswith(answer), f"without {sorted(left_out)}"


async def test_an_end_cannot_be_forged(arena: Arena) -> None:
    """Where it can be, it is the end of the job as well."""
    await hold(arena, Case(("processes", "forge_end", "1"), DENIED))


async def test_keys_of_the_server_and_records_of_others_are_out_of_reach(arena: Arena) -> None:
    directory = arena.runner.state.directory(arena.bystander.job_id)
    assert b"SECRET" in (directory / "job.json").read_bytes()
    await hold(arena, Case(("files", "read", str(directory / "job.json"), "SECRET"), {"root": "ENOENT", "uid": "EACCES"}))
    await hold(arena, Case(("files", "list_directory", str(directory), "log"), {"root": "ENOENT", "uid": "EACCES"}))


async def test_cgroups_cannot_be_written_to(arena: Arena) -> None:
    assert arena.bystander.cgroup is not None
    paths = [value for key, value in arena.bystander.cgroup.launch_items() if key in ("cgroup1-job", "cgroup2-job")]
    file = paths[0] if Path(paths[0]).is_file() else f"{paths[0]}/cgroup.procs"
    await hold(arena, Case(("files", "open_for_writing", file), {"root": "ENOENT", "uid": "EACCES"}))


@pytest.fixture
def setuid_program() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        program = Path(directory, "id")
        shutil.copy("/usr/bin/id", program)
        program.chmod(0o4755)
        yield str(program)


async def test_setuid_programs_give_nothing(arena: Arena, setuid_program: str) -> None:
    case = Case(("files", "become_root", setuid_program), {"root": "not root", "no-new-privs": "not root"})
    await hold(arena, case, change={"show": [*SHOW, str(Path(setuid_program).parent)]})


@pytest.fixture
def key() -> str:
    """A key in a session keyring that this process, like a server's, hands down to its children."""
    LIBC.syscall.restype = ctypes.c_long
    number = ctypes.c_long
    check(LIBC.syscall(number(250), number(1), None))  # keyctl(KEYCTL_JOIN_SESSION_KEYRING)
    return str(check(LIBC.syscall(number(248), b"user", b"hostile", b"secret", number(6), number(-3))))


async def test_the_servers_keys_are_out_of_reach(arena: Arena, key: str) -> None:
    await hold(arena, Case(("calls", "read_key", key), {"keyring": "EACCES", "seccomp": "EPERM"}))


async def test_the_servers_tls_key_is_out_of_reach(arena: Arena, tmp_path: Path) -> None:
    """Where its directory is shown; config.load has the key's path among what is hidden."""
    key = tmp_path / "shown" / "server.key"
    key.parent.mkdir()
    for directory in (tmp_path.parent.parent, tmp_path.parent, tmp_path):
        directory.chmod(0o755)
    key.write_text("-----BEGIN PRIVATE KEY-----")
    key.chmod(0o600)
    case = Case(("files", "read", str(key), "PRIVATE"), {"mask": "empty", "uid": "EACCES"})
    await hold(arena, case, change={"show": [*SHOW, str(key.parent)], "mask": [str(key)]})


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def same_uid(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Arena]:
    """One uid besides the bystander's: each job has that of the one before it."""
    async with open_arena(tmp_path_factory.mktemp("same-uid"), job_uids=(0x7000FF00, 3)) as arena:
        yield arena


async def test_keys_of_a_uid_that_comes_again_are_out_of_reach(same_uid: Arena) -> None:
    """The user keyring is the uid's and outlives its processes (user-keyring(7)); here until the key expires."""

    async def attacked(*attack: str, **how: Any) -> str:
        outcome = await same_uid.attack("calls", *attack, **how)
        await same_uid.runner.settled()  # only then is the uid free again
        return outcome.text

    assert await attacked("leave_key", "20", without=["seccomp"]) == "succeeded: left"
    assert await attacked("find_key", without=["seccomp"]) == "succeeded: left"
    assert await attacked("find_key") == "refused: EPERM"
    assert await attacked("leave_key", "20") == "refused: EPERM"


async def test_the_devices_of_the_host_are_not_there(arena: Arena) -> None:
    name = min(
        set(os.listdir("/dev")) - {"core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "tty", "urandom", "zero"}
    )
    assert (await arena.attack("files", "list_directory", "/dev", name)).text == "refused: not there"
    assert (await arena.attack("files", "list_directory", "/dev", name, without=["root"])).text == f"succeeded: {name}"
