"""Namespaces and cgroup membership, seen from inside a job and compared with the host's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobrunner import JobSpec
from tests.support.cgroups import member_directories
from tests.support.runner import open_runner, run_output, shell

KINDS = ("pid", "mnt", "net", "ipc", "uts", "cgroup")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_job_has_namespaces_of_its_own(tmp_path: Path, kind: str) -> None:
    async with open_runner(tmp_path) as runner:
        _, first = await run_output(runner, JobSpec("readlink", (f"/proc/self/ns/{kind}",)))
        _, second = await run_output(runner, JobSpec("readlink", (f"/proc/self/ns/{kind}",)))
    host = os.readlink(f"/proc/self/ns/{kind}").encode()
    assert first.startswith(kind.encode())
    assert first.strip() != host
    assert second.strip() != host


async def test_a_job_sees_only_its_own_processes_and_is_not_pid_1(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        _, data = await run_output(runner, shell("echo $$; ls -d /proc/[0-9]* | sort"))
    own, *visible = data.decode().split()
    assert own == "2"
    assert visible[0] == "/proc/1"
    assert len(visible) <= 5


async def test_a_job_has_only_a_loopback_and_it_is_up(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        _, data = await run_output(runner, shell("ls /proc/sys/net/ipv4/conf; cat /proc/net/dev | tail -n +3; cat /proc/net/route"))
        _, ping = await run_output(
            runner, JobSpec("python3", ("-c", "import socket; s=socket.create_server(('127.0.0.1',0)); print(s.getsockname()[0])"))
        )
    assert set(data.decode().split("\n")[:3]) == {"all", "default", "lo"}
    assert ping == b"127.0.0.1\n"


async def test_a_jobs_mounts_are_not_the_hosts(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info, data = await run_output(runner, shell("mount -t tmpfs none /tmp; cut -d' ' -f5 /proc/self/mountinfo"))
        mounted = set(data.decode().split("\n")[1:])
        assert info.status == "completed"
        assert b"permission denied" in data or b"must be superuser" in data or b"not permitted" in data
        assert {"/", "/usr", "/etc", "/proc", "/dev/pts", "/tmp", "/work"} <= mounted
        job = await runner.start(shell("sleep 100"))
        assert job.job_id not in Path("/proc/self/mountinfo").read_text()


async def test_the_host_name_is_the_jobs_name_or_id(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        _, named = await run_output(runner, JobSpec("hostname", name="builder"))
        info, by_id = await run_output(runner, JobSpec("hostname"))
    assert named == b"builder\n"
    assert by_id.decode().strip() == info.job_id


async def test_a_job_is_in_its_own_cgroup_in_every_hierarchy_that_limits_it(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info, data = await run_output(runner, shell("cat /proc/self/cgroup"))
        job = await runner.start(shell("sleep 100"))
        outside = Path("/proc/self/cgroup").read_text()
        assert job.cgroup is not None
        paths = member_directories(job.cgroup)
        assert paths
        members = [(path / "cgroup.procs").read_text().split() for path in paths]
        await job.stop(grace=0)
    assert all(members), "every directory of the job holds its processes"
    inside = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in data.decode().splitlines()}
    for name in ("cpu", "memory", "pids", "blkio") if runner.cgroup_version != "v2" else ("",):
        assert inside[name] == "/", f"{name}: the cgroup namespace is rooted in the job's own cgroup"
    assert info.job_id not in outside


async def test_standard_input_is_empty(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        _, data = await run_output(runner, shell("readlink /proc/self/fd/0; cat; ls /proc/self/fd"))
    assert data.split()[0] == b"/dev/null"


async def test_output_can_be_opened_by_its_path(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        info, data = await run_output(runner, shell("echo a > /dev/stdout; echo b | tee /dev/stderr"))
    assert info.status == "completed"
    assert sorted(data.split()) == [b"a", b"b", b"b"]
