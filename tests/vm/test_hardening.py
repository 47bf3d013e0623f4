"""What jobrunnerd.service sets, seen in the server, in a job's shim and in jobs; and `check` as systemd would start the server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jobrunner import JobSpec
from jobrunner.client import ClientJob, JobClient
from jobrunner.output import Chunk
from tests.vm.unit import connected, shim_of, show

NOT_NEEDED = {
    "SYS_MODULE": 16,
    "SYS_BOOT": 22,
    "SYS_TIME": 25,
    "SYS_RAWIO": 17,
    "SYS_PACCT": 20,
    "SYS_TTY_CONFIG": 26,
    "SYSLOG": 34,
}
NOT_NEEDED |= {
    "WAKE_ALARM": 35,
    "BLOCK_SUSPEND": 36,
    "LINUX_IMMUTABLE": 9,
    "MAC_ADMIN": 33,
    "MAC_OVERRIDE": 32,
    "AUDIT_CONTROL": 30,
}
"""capabilities(7), in the unit's order."""
SLEEP = "import os, sys, time; print('up', flush=True); time.sleep(1000)"


def status(pid: str) -> dict[str, str]:
    return dict(line.split(":", 1) for line in Path("/proc", pid, "status").read_text().splitlines())


async def said(client: JobClient, script: str) -> str:
    """What a job's Python prints."""
    job = await client.start(JobSpec("python3", ("-c", script)))
    async with job.log() as reader:
        return b"".join([part.data async for part in reader if isinstance(part, Chunk)]).decode()


@pytest.mark.usefixtures("running")
async def test_the_server_and_the_shims_have_no_right_that_neither_needs() -> None:
    async with connected() as client:
        job = await started(client)
        for pid in (show("MainPID"), shim_of(job)):
            bounding = int(status(pid)["CapBnd"], 16)
            assert [name for name, number in NOT_NEEDED.items() if bounding >> number & 1] == []
            assert bounding >> 21 & 1  # CAP_SYS_ADMIN, without which there are no jobs
        await job.stop(grace=0)


async def started(client: JobClient) -> ClientJob:
    job = await client.start(JobSpec("python3", ("-c", SLEEP)))
    async with job.log() as reader:
        await anext(reader)
    return job


@pytest.mark.usefixtures("running")
async def test_no_job_can_be_a_real_time_process_or_run_out_of_the_bounds_of_the_unit() -> None:
    script = (
        "import os\n"
        "try: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))\n"
        "except PermissionError: print('denied')\n"
        "print(open('/proc/self/oom_score_adj').read().strip(), oct(os.umask(0)))\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('Seccomp_filters')][0])"
    )
    async with connected() as client:
        realtime, adjustment, filters = (await said(client, script)).splitlines()
        server = status(show("MainPID"))
    # RestrictRealtime= is a filter of system calls, which a job has besides its own.
    assert (realtime, int(filters)) == ("denied", int(server["Seccomp_filters"]) + 1)
    assert (server["Seccomp"].strip(), adjustment) == ("2", "500 0o22")


@pytest.mark.usefixtures("running")
def test_the_server_is_as_the_unit_says() -> None:
    pid = show("MainPID")
    assert Path("/proc", pid, "oom_score_adj").read_text() == "-500\n"
    assert re.search(r"^Max open files +65536 +65536 ", Path("/proc", pid, "limits").read_text(), re.MULTILINE)
    assert status(pid)["Umask"].strip() == "0077"
    assert Path("/var/lib/jobrunner").stat().st_mode & 0o777 == 0o700
    assert [
        path.name for path in Path("/var/lib/jobrunner").rglob("*") if path.stat().st_mode & 0o077 and "work" not in path.parts
    ] == []


@pytest.mark.usefixtures("running")
async def test_jobs_can_do_what_the_hardening_that_is_left_out_would_break() -> None:
    # MemoryDenyWriteExecute, LockPersonality, RestrictSUIDSGID, RestrictAddressFamilies, ProtectHostname.
    script = (
        "import ctypes, mmap, os, socket\n"
        "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "assert ctypes.CDLL(None).personality(0x0040000) == 0, 'ADDR_NO_RANDOMIZE'\n"
        "open('tool', 'w').close(); os.chmod('tool', 0o4755); assert os.stat('tool').st_mode & 0o4000\n"
        "families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)\n"
        "[socket.socket(family, socket.SOCK_DGRAM).close() for family in families]\n"
        "print(os.uname().nodename)"
    )
    async with connected() as client:
        job = await client.start(JobSpec("python3", ("-c", script), name="its-own"))
        async with job.log() as reader:
            output = b"".join([part.data async for part in reader if isinstance(part, Chunk)])
    assert output == b"its-own\n"


def check(*properties: str, before: str = "") -> dict[str, Any]:
    """The findings of a check that systemd starts as it would start a server, with these properties more."""
    words = [word for name in ("Delegate=yes", *properties) for word in ("-p", name)]
    looks = ["/opt/jobrunner/bin/jobrunnerd", "check", "--json", "--state-dir", "/var/lib/jobrunner"]
    wrapped = ["unshare", "--mount", "sh", "-c", f"{before} && exec {shlex.join(looks)}"] if before else looks
    command = ["systemd-run", "--quiet", "--wait", "--pipe", *words, *wrapped]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == "", shlex.join(command)
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


def left_over() -> list[str]:
    return [str(path) for path in Path("/sys/fs/cgroup").rglob("*jobrunner-check*")]


def test_nothing_is_missing_where_systemd_delegates() -> None:
    found = check()
    assert {name: finding for name, finding in found.items() if finding["level"] == "missing"} == {}
    assert (found["job"]["level"], found["cgroup"]["what"]) == ("ok", "v2, can be written to")
    assert left_over() == []


def test_what_a_directive_takes_away_is_told_with_its_name() -> None:
    found = check("RestrictNamespaces=yes", "TasksMax=900")
    assert found["namespace pid"]["level"] == "missing"
    assert "no RestrictNamespaces=" in found["namespace pid"]["remedy"]
    assert (found["processes"]["level"], "TasksMax=infinity" in found["processes"]["remedy"]) == ("limited", True)


def test_a_tree_that_is_read_only_in_part_is_left_as_it_was() -> None:
    own = "/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)"
    # Directories can be made in it, and its controllers cannot be handed down to them.
    file = f"{own}/cgroup.subtree_control"
    found = check(before=f"mount --bind {file} {file} && mount -o remount,bind,ro {file}")
    assert found["cgroup"]["level"] == "missing"
    assert left_over() == []
