"""What programs of others say about a job: capsh of libcap, findmnt of util-linux, the kernel itself from outside."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobrunner.sandbox import HIDE
from tests.hostile.arena import Arena, process_of
from tests.support.runner import output
from tests.support.shim import status_field

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.requires("root")]

WRITABLE = {"/proc", "/dev/pts", "/dev/shm", "/dev/mqueue", "/tmp", "/work"}
DEVICES = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"}
OWN = {"proc", "devpts", "mqueue", "tmpfs"}
"""File systems that are the job's own when they are writable: fresh for each."""


async def said(arena: Arena, *command: str, **how: Any) -> str:
    job = await arena.start(*command, **how)
    data = (await output(job)).decode()
    info = await job.wait()
    assert info.status == "completed", data
    return data


@pytest.mark.requires("command:capsh")
async def test_capsh_finds_no_capability(arena: Arena) -> None:
    lines = dict(line.split("=", 1) for line in (await said(arena, "/usr/sbin/capsh", "--print")).splitlines() if "=" in line)
    assert (lines["Current: "], lines["Bounding set "], lines["Ambient set "]) == ("", "", "")
    without = await said(arena, "/usr/sbin/capsh", "--print", without=["uid", "capabilities"])
    assert "cap_sys_admin" in without.partition("Bounding set =")[2]


@pytest.mark.requires("command:findmnt")
async def test_findmnt_finds_nothing_of_the_host_that_could_be_written_to(arena: Arena) -> None:
    mounts = await mounts_of(arena)
    for target, fstype, options in mounts:
        assert "nosuid" in options, target
        assert "nodev" in options or target.startswith("/dev") or is_cover(target), target
        if target in WRITABLE:
            assert fstype in OWN or target == "/work", target
        else:
            assert "ro" in options or target in DEVICES or is_cover(target), target
    assert [target for target, fstype, options in await mounts_of(arena, without=["root"]) if "rw" in options and fstype not in OWN]


@pytest.mark.requires("command:findmnt")
async def test_findmnt_finds_nothing_of_the_host_in_a_root_that_can_be_written_to(arena: Arena) -> None:
    mounts = await mounts_of(arena, writable=True)
    for target, fstype, options in mounts:
        assert "nosuid" in options, target
        if "rw" in options:
            assert fstype in {*OWN, "overlay"} or target == "/work" or target in DEVICES or is_cover(target), target
    assert {target for target, fstype, _ in mounts if fstype == "overlay"} >= {"/usr", "/etc"}
    # One on another hides what is below from sight, and not from `..`.
    assert len(mounts) == len({target for target, _, _ in mounts})


def is_cover(target: str) -> bool:
    """A file that /dev/null hides: to write to it is to write to nothing."""
    return target in HIDE or target.startswith("/proc/")


async def mounts_of(arena: Arena, **how: Any) -> list[tuple[str, str, set[str]]]:
    """Targets, each with its type, and the options of the mount itself."""
    command = ("/usr/bin/findmnt", "--json", "--list", "--output", "TARGET,FSTYPE,VFS-OPTIONS")
    found = json.loads(await said(arena, *command, **how))["filesystems"]
    return [(one["target"], one["fstype"], set(one["vfs-options"].split(","))) for one in found]


async def test_the_kernel_says_the_same_from_outside(arena: Arena) -> None:
    job = await arena.start("/usr/bin/sleep", "600")
    fields = {
        name: status_field(process_of(job, 2), name)
        for name in ("Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")
    }
    await job.stop(grace=0)
    assert set(fields["Uid"].split()) == set(fields["Gid"].split())
    assert int(fields["Uid"].split()[0]) >= 1 << 16
    assert (fields["Groups"], fields["NoNewPrivs"], fields["Seccomp"]) == ("", "1", "2")
    assert (int(fields["CapEff"], 16), int(fields["CapBnd"], 16)) == (0, 0)
