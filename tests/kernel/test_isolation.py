"""What JobRunner gives every job: all protections, always."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobrunner import JobSpec
from tests.support.runner import open_runner, run_output, shell
from tests.support.shim import status_field

pytestmark = pytest.mark.requires("root")

CALLS = """
import ctypes, errno, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    ctypes.set_errno(0)
    libc.syscall(*args)
    return errno.errorcode.get(ctypes.get_errno(), "ok")
def family(number):
    try: socket.socket(number, socket.SOCK_STREAM).close()
    except OSError as exc: return errno.errorcode[exc.errno]
    return "ok"
print(call(165, 0, 0, 0, 0, 0), call(272, 0x10000000), call(435, 0, 0), call(56, 0x10000000 | 17, 0, 0, 0, 0), call(250, 0, 0))
print(call(321, 0, 0, 0), call(425, 1, 0), call(308, 0, 0), call(16, 0, 0x5412, 0), call(16, 0, 0x100005412, 0), call(467, 0))
print(call(135, 0x0040000), call(135, 0x0400000), call(272, 0x400), family(40), family(38), family(1), family(2))
print(call(0x40000000 | 39))
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls are an architecture's")
async def test_the_filter_denies_what_a_job_has_no_use_for(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        _, data = await run_output(runner, JobSpec("python3", ("-c", CALLS)))
    eperm = "EPERM"
    assert [line.split() for line in data.decode().splitlines()] == [
        [eperm, eperm, "ENOSYS", eperm, eperm],
        [eperm] * 6,
        ["ok", eperm, "ok", "EAFNOSUPPORT", "EAFNOSUPPORT", "ok", "ok"],
        [eperm],
    ]


async def test_every_job_has_a_uid_of_its_own_and_a_filter(tmp_path: Path) -> None:
    async with open_runner(tmp_path, job_uids=(0x72000000, 9)) as runner:  # of no other server on this host
        jobs = [await runner.start(shell("echo; exec sleep 100")) for _ in range(2)]
        uids = [job.record.uid for job in jobs]
        assert len({*uids}) == 2
        assert all(0x72000000 <= uid < 0x72000009 for uid in uids)
        for uid in uids:
            (pid,) = [
                int(pid) for pid in os.listdir("/proc") if pid.isdigit() and status_field(int(pid), "Uid").startswith(f"{uid}\t")
            ]
            fields = {name: status_field(pid, name) for name in ("Seccomp", "NoNewPrivs", "CapEff", "CapBnd", "Groups")}
            assert fields == {"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0" * 16, "CapBnd": "0" * 16, "Groups": ""}


async def test_the_state_directory_and_configured_secrets_are_hidden(tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    shown.mkdir(mode=0o755)
    (shown / "key").write_text("secret")
    (shown / "file").write_text("open")
    async with open_runner(shown, show=(str(shown),), hide=(str(shown / "key"),)) as runner:
        _, data = await run_output(runner, shell(f"cat {shown}/key {shown}/file; ls -A {shown}/state; head -c1 /etc/shadow"))
    assert data == b"open"


async def test_the_work_directory_is_kept_and_given_to_root_at_the_end(tmp_path: Path) -> None:
    script = "pwd; echo $HOME; whoami; mkdir -p a/b; echo x > a/b/file; ln -s /etc/passwd link; cp /bin/true su; chmod 6755 su"
    async with open_runner(tmp_path) as runner:
        info, data = await run_output(runner, shell(script))
        await runner.settled()
        work = runner.state.directory(info.job_id) / "work"
        left = [work, *work.rglob("*")]
        assert {path.name for path in left} == {"work", "a", "b", "file", "link", "su"}
        assert {path.lstat().st_uid for path in left} == {0}
        assert (work / "su").stat().st_mode & 0o7777 == 0o755
        await runner.remove(info.job_id)
        assert not work.exists()
    assert data.split() == [b"/work", b"/work", b"job"]
    assert Path("/etc/passwd").stat().st_uid == 0


async def test_a_job_sees_its_own_cgroups(tmp_path: Path) -> None:
    read = (
        "cat /sys/fs/cgroup/pids/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids.max; touch /sys/fs/cgroup/x 2>/dev/null || echo no"
    )
    async with open_runner(tmp_path) as runner:
        _, data = await run_output(runner, shell(read))
    assert data == b"512\nno\n"
