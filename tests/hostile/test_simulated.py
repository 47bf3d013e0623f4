"""The very filter that jobs get, in libseccomp's own simulator: an outside witness that knows nothing of this host's kernel."""

from __future__ import annotations

import errno
import platform
import subprocess
from pathlib import Path

import pytest

from jobrunner.linux.seccomp import compile_filter
from tests.hostile.inside.probe import HIGHEST
from tests.hostile.test_filter import ANSWERS, DENIED

pytestmark = [
    pytest.mark.requires("command:scmp_bpf_sim"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the table has the numbers of x86_64"),
]

BY_ARGUMENT = {"clone with all flags", "unshare with all flags"}
ALLOW, EPERM, EINVAL, ENOMEM = "ALLOW", *(f"ERRNO({number})" for number in (errno.EPERM, errno.EINVAL, errno.ENOMEM))
EAFNOSUPPORT, EPROTONOSUPPORT = (f"ERRNO({number})" for number in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT))
DONE = "ERRNO(0)"
CLONE, UNSHARE, SOCKET, SETSOCKOPT, IOCTL, PERSONALITY, PRLIMIT64, SETRLIMIT, SECCOMP = 56, 272, 41, 54, 16, 135, 302, 160, 317
CORE = 4
NEWUSER, SIGCHLD, UPPER = 0x10000000, 17, 1 << 32
ARGUMENTS = [
    ((CLONE, SIGCHLD), ALLOW),
    ((CLONE, NEWUSER | SIGCHLD), EPERM),
    ((CLONE, UPPER | NEWUSER), EPERM),
    ((CLONE, 0xFFFFFFFF), EPERM),
    ((UNSHARE, 0x00020000), ALLOW),  # the kernel refuses it to who has no right
    ((UNSHARE, NEWUSER), EPERM),
    ((UNSHARE, 0x00000400 | NEWUSER), EPERM),
    *(((SOCKET, family, 1, protocol), ALLOW) for family in (1, 2, 10) for protocol in (0, 1, 6, 17, 58, 262)),
    *(((SOCKET, 16, 3, protocol), ALLOW) for protocol in (0, 4, 15, 16)),
    *(((SOCKET, 16, 3, protocol), EPROTONOSUPPORT) for protocol in (1, 2, 3, 5, 6, 9, 11, 12, 14, 17, 20, 21, 31, UPPER | 2)),
    *(((SOCKET, family, 1, protocol), EPROTONOSUPPORT) for family in (2, 10) for protocol in (33, 115, 132, UPPER | 132, 256)),
    ((SETSOCKOPT, 0, 1, 8), ALLOW),
    *(((SETSOCKOPT, 0, 1, option), EPERM) for option in (26, 50, 51, 52, UPPER | 26)),
    ((SETSOCKOPT, 0, UPPER | 1, 26), EPERM),
    ((SETSOCKOPT, 0, 6, 26), ALLOW),  # another level's option
    *(((SECCOMP, 1, flags), ALLOW) for flags in (0, 1, 2, 4)),
    *(((SECCOMP, 1, flags), EINVAL) for flags in (8, 9, 8 | 0x10)),
    ((SECCOMP, UPPER | 1, 8), EINVAL),
    ((SECCOMP, 0, 0), ALLOW),
    *(((SOCKET, family), EAFNOSUPPORT) for family in (3, 4, 15, 17, 31, 38, 40, 44, 45, 0xFFFF, 0xFFFFFFFF)),
    ((SOCKET, UPPER | 40), EAFNOSUPPORT),
    ((IOCTL, 0, 0x5401), ALLOW),
    ((IOCTL, 0, 0x5412), EPERM),
    ((IOCTL, 0, UPPER | 0x5412), EPERM),
    ((IOCTL, 0, 0x541C), EPERM),
    ((IOCTL, 0, 0x5423), EPERM),
    *(((IOCTL, 0, command), EPERM) for command in (0x401C5820, 0x50009401, 0x5000940E, 0x50009417, 0x50009418, 0x4008941A)),
    ((PRLIMIT64, 0, 7), ALLOW),
    ((PRLIMIT64, 1, 7), EPERM),
    ((PRLIMIT64, UPPER | 1, 7), EPERM),
    ((PRLIMIT64, 0, CORE), ALLOW),
    ((PRLIMIT64, 0, CORE, 1), DONE),
    ((PRLIMIT64, 0, UPPER | CORE, 1), DONE),
    ((PRLIMIT64, 0, CORE, 1, 1), EPERM),
    ((SETRLIMIT, CORE, 1), DONE),
    ((SETRLIMIT, 7, 1), ALLOW),
    ((PERSONALITY, 0), ALLOW),
    ((PERSONALITY, 0xFFFFFFFF), ALLOW),
    ((PERSONALITY, 0x0040000), ALLOW),
    ((PERSONALITY, 0x0400000), EPERM),
    ((PERSONALITY, 6), EPERM),
    ((9, 0, 4096, 3, 0x22), ALLOW),
    ((9, 0, 4096, 3, 0x22 | 0x40000), ENOMEM),
    ((9, 0, 4096, 3, 0x22 | 0x40000 | 30 << 26), ENOMEM),
    ((319, 0, 1), ALLOW),
    ((319, 0, 1 | 4), ENOMEM),
    ((29, 0, 4096, 0o1600), ALLOW),
    ((29, 0, 4096, 0o1600 | 0o4000), ENOMEM),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("filter") / "filter.bpf"
    path.write_bytes(compile_filter())
    return path


def simulated(program: Path, number: int, *args: int, architecture: str = "x86_64") -> str:
    """What the kernel would do, in the simulator's words."""
    given = [word for index, arg in enumerate(args) for word in (f"-{index}", str(arg))]
    command = ["scmp_bpf_sim", "-f", str(program), "-a", architecture, "-s", str(number), *given]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_every_call_of_the_table_is_denied_and_no_other_one(program: Path) -> None:
    found = {number: simulated(program, number) for number in range(HIGHEST)}
    denied = {number: EPERM for name, number in DENIED.items() if name not in BY_ARGUMENT}
    answered = {number: f"ERRNO({error})" for number, error in ANSWERS.items()}
    assert {number: action for number, action in found.items() if action != ALLOW} == denied | answered


@pytest.mark.parametrize(
    ("call", "action"), ARGUMENTS, ids=lambda value: "-".join(map(hex, value)) if isinstance(value, tuple) else value
)
def test_what_depends_on_an_argument(program: Path, call: tuple[int, ...], action: str) -> None:
    assert simulated(program, *call) == action


def test_calls_of_other_abis_are_none_of_ours(program: Path) -> None:
    """x32 has a bit of its own in the numbers; each may mean another call in our table."""
    assert {simulated(program, number, architecture="x86") for number in range(0, 450, 7)} == {EPERM}
    assert {simulated(program, 0x40000000 | number) for number in range(0, 450, 7)} == {EPERM}
