"""The filter of system calls that every job has, compiled by libseccomp into the program that seccomp(2) takes.

What is denied is what Docker and its kind deny, by EPERM, so that a program sees what it would see without the right. These are
the ways to more of the kernel than a job needs, whatever rights it has by mistake: mounts, modules, other namespaces, keys, BPF.
ptrace(2) stays: a uid and a PID namespace of its own confine it, and debuggers and sanitizers need it.
"""

from __future__ import annotations

import errno
import os
import platform
from typing import Any

from jobrunner.errors import HostError

__all__ = ["REMEDY", "compile_filter"]

REMEDY = "install libseccomp: apt-get install libseccomp2, dnf install libseccomp"

DENIED = (
    *("mount", "umount", "umount2", "pivot_root", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick"),
    *("mount_setattr", "open_by_handle_at", "name_to_handle_at", "fanotify_init", "quotactl", "acct", "swapon", "swapoff"),
    *(
        "init_module",
        "finit_module",
        "delete_module",
        "kexec_load",
        "kexec_file_load",
        "reboot",
        "syslog",
        "bpf",
        "perf_event_open",
    ),
    *("keyctl", "add_key", "request_key", "userfaultfd", "setns", "settimeofday", "clock_settime", "stime", "lookup_dcookie"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "iopl", "ioperm", "vm86", "vm86old", "uselib", "nfsservctl"),
    *("chroot", "sethostname", "setdomainname", "clock_adjtime", "vhangup", "sysfs", "ustat", "_sysctl"),
)
DENIED_NUMBERS = {"pidfd_getfd": 438, "quotactl_fd": 443, "open_tree_attr": 467, "file_setattr": 469}
"""Calls that are newer than libseccomp may be; numbers from 424 on are those of every architecture."""
CLONE_NEWUSER = 0x10000000
TERMINALS = {"TIOCSTI": 0x5412, "TIOCLINUX": 0x541C, "TIOCSETD": 0x5423}
"""ioctl(2): what two of them put in is read by whoever reads the terminal next; the third has the kernel load a module."""
SUBVOLUMES = {
    **{"BTRFS_IOC_SNAP_CREATE": 0x50009401, "BTRFS_IOC_SUBVOL_CREATE": 0x5000940E},
    **{"BTRFS_IOC_SNAP_CREATE_V2": 0x50009417, "BTRFS_IOC_SUBVOL_CREATE_V2": 0x50009418, "BTRFS_IOC_SUBVOL_SETFLAGS": 0x4008941A},
}
"""ioctl(2): by these anybody makes a file system in his directory, which rm(1) does not empty if it is a read-only one."""
FILE_ATTRIBUTES = {"FS_IOC_FSSETXATTR": 0x401C5820, "FS_IOC_SETFLAGS": 0x40086602, "FS_IOC32_SETFLAGS": 0x40046602}
"""ioctl(2), and so file_setattr(2): by these a file's owner takes it out of its project, whose quota bounds a directory."""
FAMILIES = {0: "AF_UNSPEC", 1: "AF_UNIX", 2: "AF_INET", 10: "AF_INET6", 16: "AF_NETLINK"}
"""socket(2): all that a job may open; the others (AF_VSOCK, AF_ALG, AF_PACKET ...) are EAFNOSUPPORT."""
HIGHEST_FAMILY = max(FAMILIES)
NETLINK = {0: "NETLINK_ROUTE", 4: "NETLINK_SOCK_DIAG", 15: "NETLINK_KOBJECT_UEVENT", 16: "NETLINK_GENERIC"}
"""Of AF_NETLINK. What a job sends itself by NETLINK_USERSOCK, no memory limit counts, and others have the kernel load a module."""
HIGHEST_NETLINK = max(NETLINK)
PROTOCOLS = {"IPPROTO_DCCP": 33, "IPPROTO_L2TP": 115, "IPPROTO_SCTP": 132, "IPPROTO_SMC": 256}
"""For each the kernel would load a module, for anybody who asks."""
SOL_SOCKET = 1
SOCKET_FILTERS = {"SO_ATTACH_FILTER": 26, "SO_ATTACH_BPF": 50, "SO_ATTACH_REUSEPORT_CBPF": 51, "SO_ATTACH_REUSEPORT_EBPF": 52}
"""setsockopt(2). What they are compiled to is in memory that the host has once, net.core.bpf_jit_limit."""
SET_MODE_FILTER, NEW_LISTENER = 1, 8
"""seccomp(2): a filter that a descriptor keeps, when its process has gone; the memory is the same."""
PERSONALITIES = {0x00, 0x08}
"""personality(2): PER_LINUX and PER_LINUX32, with any flag but the next two; 0xffffffff asks."""
PERSONALITY_ASK_BIT = 0x80000000
LAXER = (0x00100000, 0x00400000)
"""MMAP_PAGE_ZERO, READ_IMPLIES_EXEC."""
HUGE_PAGES = {"mmap": (3, 0x40000), "memfd_create": (1, 0x4), "shmget": (2, 0o4000)}
"""MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB, each with the place of its argument: no memory limit counts the host's huge pages."""
RLIMIT_CORE = 4
WORD = 0xFFFFFFFF
"""The kernel looks at the lower half of an argument that is an int; the upper half must not hide it."""


def compile_filter() -> bytes:
    """The program. HostError, with the remedy, where libseccomp is not there. A few milliseconds, so not on the loop."""
    try:
        import pyseccomp  # it looks for the library when it is imported
    except (ImportError, RuntimeError, OSError) as exc:
        raise HostError(f"cannot compile the filter of system calls: libseccomp is not there; {REMEDY}") from exc
    try:
        rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.ERRNO(errno.EPERM))
        rules.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)  # a binary tree: few steps for a call that is allowed
        _add_rules(rules, pyseccomp)
        _add_socket_rules(rules, pyseccomp)
        with os.fdopen(os.memfd_create("jobrunner-seccomp"), "w+b") as file:
            rules.export_bpf(file)
            file.seek(0)
            return file.read()
    except OSError as exc:
        raise HostError(f"cannot compile the filter of system calls: {exc.strerror}; libseccomp 2.5 or later does") from exc


def _add_rules(rules: Any, library: Any) -> None:
    arg, masked = library.Arg, library.MASKED_EQ
    denied = library.ERRNO(errno.EPERM)
    for call in (*DENIED, *DENIED_NUMBERS.values()):
        rules.add_rule(denied, call)
    # glibc and musl fall back to clone, whose flags can be looked at; those of clone3 are behind a pointer.
    rules.add_rule(library.ERRNO(errno.ENOSYS), "clone3")
    # One table for the whole host, fs.aio-max-nr, without a share for anybody: who uses libaio falls back where a kernel has none.
    rules.add_rule(library.ERRNO(errno.ENOSYS), "io_setup")
    old = platform.machine() == "s390x"  # its clone(2) has the flags second, its mmap(2) has them behind a pointer
    for call, (index, flag) in HUGE_PAGES.items():
        if call != "mmap" or not old:
            rules.add_rule(library.ERRNO(errno.ENOMEM), call, arg(index, masked, flag, flag))
    flags = 1 if old else 0
    rules.add_rule(denied, "clone", arg(flags, masked, CLONE_NEWUSER, CLONE_NEWUSER))
    rules.add_rule(denied, "unshare", arg(0, masked, CLONE_NEWUSER, CLONE_NEWUSER))
    for command in (*TERMINALS.values(), *FILE_ATTRIBUTES.values(), *SUBVOLUMES.values()):
        rules.add_rule(denied, "ioctl", arg(1, masked, WORD, command))
    # Its first argument is a process, and of a server that is not root a job's pid 1 has the job's uid: it keeps its limits.
    rules.add_rule(denied, "prlimit64", arg(0, masked, WORD, 1))
    # As a kernel says that does not have it.
    listener = arg(1, masked, NEW_LISTENER, NEW_LISTENER)
    rules.add_rule(library.ERRNO(errno.EINVAL), "seccomp", arg(0, masked, WORD, SET_MODE_FILTER), listener)
    for domain in set(range(0x14)) - PERSONALITIES:
        rules.add_rule(denied, "personality", arg(0, masked, 0xFF, domain))
    # A core limit of 1 keeps the host's handler of core dumps away, one of 0 does not (core(5)): who sets it is told that it is.
    done = library.ERRNO(0)
    rules.add_rule(done, "setrlimit", arg(0, masked, WORD, RLIMIT_CORE))
    rules.add_rule(done, "prlimit64", arg(1, masked, WORD, RLIMIT_CORE), arg(2, library.NE, 0), arg(3, library.EQ, 0))
    rules.add_rule(denied, "prlimit64", arg(1, masked, WORD, RLIMIT_CORE), arg(2, library.NE, 0), arg(3, library.NE, 0))
    for flag in LAXER:
        rules.add_rule(denied, "personality", arg(0, masked, flag | PERSONALITY_ASK_BIT, flag))


def _add_socket_rules(rules: Any, library: Any) -> None:
    arg, masked = library.Arg, library.MASKED_EQ
    denied, no_protocol = library.ERRNO(errno.EPERM), library.ERRNO(errno.EPROTONOSUPPORT)
    unknown = library.ERRNO(errno.EAFNOSUPPORT)
    for family in range(HIGHEST_FAMILY):
        if family not in FAMILIES:
            rules.add_rule(unknown, "socket", arg(0, masked, WORD, family))
    rules.add_rule(unknown, "socket", arg(0, library.GT, HIGHEST_FAMILY))
    netlink = arg(0, masked, WORD, 16)
    for protocol in set(range(HIGHEST_NETLINK)) - set(NETLINK):
        rules.add_rule(no_protocol, "socket", netlink, arg(2, masked, WORD, protocol))
    rules.add_rule(no_protocol, "socket", netlink, arg(2, library.GT, HIGHEST_NETLINK))
    for protocol in PROTOCOLS.values():
        rules.add_rule(no_protocol, "socket", arg(2, masked, WORD, protocol))
    for option in SOCKET_FILTERS.values():
        rules.add_rule(denied, "setsockopt", arg(1, masked, WORD, SOL_SOCKET), arg(2, masked, WORD, option))
