"""Attacks by questions: what does the kernel tell, or hand out, of mounts, namespaces and processes that are not ours?

The calls are new ones, Linux 5.3 to 6.18, by their numbers on x86_64.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

from tests.hostile.inside.base import Contained, attack, syscall

PIDFD_OPEN, OPEN_BY_HANDLE, STATMOUNT, LISTMOUNT = 434, 304, 457, 458
GET_MOUNT_NAMESPACE, GET_PARENT = 0xFF03, 0xB702
NEXT_MOUNT_NAMESPACE = 0x8010B70B
PIDFS_ROOT, PIDFS_HANDLE = -10002, 0xFE
EVERYTHING = 0xFFFFFFFFFFFFFFFF
MOST = 4096


@attack
def namespace_of(pid: str) -> str:
    """PIDFD_GET_MNT_NAMESPACE, Linux 6.11."""
    os.close(fcntl.ioctl(syscall(PIDFD_OPEN, int(pid), 0), GET_MOUNT_NAMESPACE, 0))
    return "a mount namespace"


@attack
def parent_namespace() -> str:
    """NS_GET_PARENT, of the PID namespace."""
    with open("/proc/self/ns/pid", "rb") as namespace:
        os.close(fcntl.ioctl(namespace, GET_PARENT))
    return "the parent"


@attack
def next_mount_namespace() -> str:
    """NS_MNT_GET_NEXT, Linux 6.12: from one's own to all others of the host."""
    with open("/proc/self/ns/mnt", "rb") as namespace:
        os.close(fcntl.ioctl(namespace, NEXT_MOUNT_NAMESPACE, bytearray(struct.pack("IIQ", 16, 0, 0))))
    return "another"


@attack
def process_by_handle(inode: str) -> str:
    """A pidfd of a process whose pid means nothing here; by its inode in pidfs, Linux 6.14, where this needs no right."""
    os.close(syscall(OPEN_BY_HANDLE, PIDFS_ROOT, struct.pack("IIQ", 8, PIDFS_HANDLE, int(inode)), os.O_CLOEXEC))
    return "a process"


@attack
def foreign_mounts(around: str) -> str:
    """Mounts that are not in /proc/self/mountinfo: all that listmount(2) tells, and the ids around ours, of others' namespaces."""
    buffer = (ctypes.c_uint64 * MOST)()
    count = syscall(LISTMOUNT, struct.pack("IIQQQ", 32, 0, EVERYTHING, 0, 0), ctypes.addressof(buffer), MOST, 0)
    listed = list(buffer[:count])
    with open("/proc/self/mountinfo") as file:
        told = len(file.readlines())
    if count > told:
        return f"{count} mounts, of which {told} are told"
    for one in range(min(listed) - int(around), max(listed) + int(around)):
        if one not in listed and is_mount(one):
            return f"mount {one}"
    raise Contained(f"none but {told}" if told == count else f"{count} of {told}")


def is_mount(number: int) -> bool:
    answer = ctypes.create_string_buffer(4096)
    try:
        syscall(STATMOUNT, struct.pack("IIQQQ", 32, 0, number, 3, 0), ctypes.addressof(answer), 4096, 0)
    except OSError:
        return False
    return True
