"""The filter of system calls against a table written by hand, with the kernel as the judge: every number is called in a job."""

from __future__ import annotations

import errno
import platform
import re
from typing import Any

import pytest

from tests.hostile.arena import Arena

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.requires("root", "command:python3"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the table has the numbers of x86_64"),
]

DENIED = {
    "clone with all flags": 56,
    "syslog": 103,
    "uselib": 134,
    "ustat": 136,
    "sysfs": 139,
    "vhangup": 153,
    "pivot_root": 155,
    "_sysctl": 156,
    "chroot": 161,
    "acct": 163,
    "settimeofday": 164,
    "mount": 165,
    "umount2": 166,
    "swapon": 167,
    "swapoff": 168,
    "reboot": 169,
    "sethostname": 170,
    "setdomainname": 171,
    "iopl": 172,
    "ioperm": 173,
    "init_module": 175,
    "delete_module": 176,
    "quotactl": 179,
    "nfsservctl": 180,
    "lookup_dcookie": 212,
    "clock_settime": 227,
    "kexec_load": 246,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "unshare with all flags": 272,
    "perf_event_open": 298,
    "fanotify_init": 300,
    "name_to_handle_at": 303,
    "open_by_handle_at": 304,
    "clock_adjtime": 305,
    "setns": 308,
    "finit_module": 313,
    "kexec_file_load": 320,
    "bpf": 321,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "open_tree_attr": 467,
    "file_setattr": 469,
}
"""asm/unistd_64.h; everything else is allowed, but what is answered as by a kernel that does not have it."""
ANSWERS = {435: errno.ENOSYS, 206: errno.ENOSYS}
"""clone3: libc falls back to clone; io_setup: its contexts are counted for the whole host."""
HUGE = {9: errno.ENOMEM, 319: errno.ENOMEM, 29: errno.ENOMEM}
"""mmap, memfd_create, shmget: with the flag that asks for huge pages, as all flags do."""


async def answers(arena: Arena, **how: Any) -> dict[int, int]:
    outcome = await arena.attack("probe", "every_call", **how)
    assert outcome.word == "succeeded", outcome
    return {int(number): int(error) for number, error in re.findall(r"^(\d+) (-?\d+)$", outcome.output.decode(), re.MULTILINE)}


async def test_exactly_these_calls_are_denied(arena: Arena) -> None:
    """To root with every capability, whom the kernel would let."""
    root = ["uid", "capabilities"]
    found, unfiltered = await answers(arena, without=root), await answers(arena, without=[*root, "seccomp"])
    refused = {number for number, error in found.items() if error == errno.EPERM and unfiltered[number] != errno.EPERM}
    assert refused == set(DENIED.values())
    answers_ = ANSWERS | HUGE
    assert {number: found[number] for number in answers_} == answers_
    assert {number for number in answers_ if unfiltered[number] == answers_[number]} == set()
