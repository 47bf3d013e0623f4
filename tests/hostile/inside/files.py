"""Attacks on files: what is secret on the host, and what the kernel offers as files."""

from __future__ import annotations

import os
import pty
import re
import select
import stat

from tests.hostile.inside.base import Contained, attack, syscall

AT_FDCWD = -100
MKNODAT = 259


@attack
def read(path: str, wanted: str = "") -> str:
    """Read a file that has this text in it."""
    with open(path, "rb") as file:
        data = file.read(1 << 20)
    if not data:
        raise Contained("empty")
    if wanted.encode() not in data:
        raise Contained("something else is there")
    return f"{len(data)} bytes"


@attack
def list_directory(path: str, wanted: str) -> str:
    """See that something is there."""
    names = os.listdir(path)
    if wanted not in names:
        raise Contained("not there")
    return wanted


@attack
def open_for_writing(path: str) -> str:
    """Nothing is written."""
    os.close(os.open(path, os.O_WRONLY))
    return "open"


@attack
def create(path: str) -> str:
    """A file where none should be; it is removed again."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(path)
    return "made"


@attack
def make_device(directory: str) -> str:
    """A device node of one's own would be the host's disk; here it is the harmless /dev/zero."""
    path = os.path.join(directory, f"zero-{os.getpid()}")
    syscall(MKNODAT, AT_FDCWD, path.encode(), stat.S_IFCHR | 0o666, os.makedev(1, 5))
    try:
        with open(path, "rb") as device:
            return f"{len(device.read(4))} bytes of the device"
    finally:
        os.unlink(path)


@attack
def become_root(program: str) -> str:
    """Execute a copy of id(1) that belongs to root and has the setuid bit."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        os.execv(program, ["id", "-u"])
    os.close(writing)
    with open(reading, "rb") as output:
        uid = output.read().strip().decode()
    status = os.waitpid(child, 0)[1]
    if status:
        raise Contained(f"wait status {status}")
    if uid != "0":
        raise Contained("not root")
    return "root"


@attack
def run_setuid(program: str) -> str:
    """A setuid program of the host's that asks for a password first, as su(1) does: whose is it while it asks?"""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(program, [program])
    select.select([terminal], [], [], 20)
    with open(f"/proc/{child}/status") as file:
        effective = re.search(r"^Uid:\t\d+\t(\d+)", file.read(), re.MULTILINE)
    os.close(terminal)  # its terminal hangs up
    if effective is None or effective[1] != "0":
        raise Contained("not root")
    return "root"
