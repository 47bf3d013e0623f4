"""Attacks by system calls. Those that would harm the host if they had their way get arguments that make no sense, see `reached`.

Numbers are those of x86_64, from asm/unistd_64.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

from tests.hostile.inside.base import LIBC, Contained, attack, check, reached, syscall

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID = 0x20000, 0x10000000, 0x40000000, 0x20000000
UNMAPPED = 8
"""An address that nobody has: the kernel says EFAULT once it looks there."""


@attack
def mount_tmpfs(target: str) -> str:
    check(LIBC.mount(b"none", target.encode(), b"tmpfs", 0, b"size=64k"))
    check(LIBC.umount2(target.encode(), 2))
    return "mounted"


@attack
def remount_writable(target: str) -> str:
    """MS_REMOUNT|MS_BIND without MS_RDONLY; what is read-only would not be any more."""
    check(LIBC.mount(None, target.encode(), None, 32 | 4096, None))
    return "remounted"


@attack
def unmount(target: str) -> str:
    """Take a cover away, and see what is under it."""
    check(LIBC.umount2(target.encode(), 2))
    return "unmounted"


@attack
def fsopen() -> str:
    os.close(syscall(430, b"tmpfs", 0))
    return "a file system"


@attack
def open_tree() -> str:
    os.close(syscall(428, -100, b"/", 1))  # OPEN_TREE_CLONE
    return "a copy of the root"


@attack
def mount_setattr(target: str) -> str:
    """Clear MOUNT_ATTR_RDONLY of a mount."""
    attributes = struct.pack("4Q", 0, 1, 0, 0)
    syscall(442, -100, target.encode(), 0, attributes, len(attributes))
    return "set"


@attack
def unshare(*kinds: str) -> str:
    flags = {"mount": CLONE_NEWNS, "user": CLONE_NEWUSER, "network": CLONE_NEWNET, "pid": CLONE_NEWPID}
    check(LIBC.unshare(sum(flags[kind] for kind in kinds)))
    return " ".join(kinds)


@attack
def clone_user() -> str:
    """clone(2), the flags in its first argument."""
    pid = syscall(56, CLONE_NEWUSER | 17, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "a child that is root in there"


@attack
def clone3_user() -> str:
    """clone3(2), whose flags a filter cannot see."""
    args = struct.pack("8Q", CLONE_NEWUSER, 0, 0, 0, 17, 0, 0, 0)
    pid = syscall(435, args, len(args))
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "a child that is root in there"


@attack
def setns() -> str:
    with open("/proc/self/ns/uts", "rb") as namespace:
        check(LIBC.setns(namespace.fileno(), 0))
    return "entered"


@attack
def pivot_root() -> str:
    """Of a directory that is no mount point: EINVAL for who may."""
    return reached(155, b"/usr/bin", b"/usr/bin")


@attack
def chroot() -> str:
    os.chroot("/usr")
    return "another root"


@attack
def reach(number: str, *args: str) -> str:
    """Any system call, with numbers as arguments."""
    return reached(int(number), *(int(arg) for arg in args))


@attack
def set_host_name() -> str:
    name = os.uname().nodename.encode()
    check(LIBC.sethostname(name, len(name)))
    return "set"


@attack
def io_uring() -> str:
    os.close(syscall(425, 1, ctypes.create_string_buffer(120).raw))
    return "a ring"


@attack
def userfaultfd() -> str:
    os.close(syscall(323, 1))  # UFFD_USER_MODE_ONLY: the kernel gives it to anybody
    return "a descriptor"


@attack
def bpf_map() -> str:
    os.close(syscall(321, 0, struct.pack("4I", 2, 4, 4, 1) + bytes(56), 72))
    return "a map"


@attack
def read_key(serial: str) -> str:
    """A key in the session keyring of whoever started the server."""
    data = ctypes.create_string_buffer(64)
    size = syscall_pointer(250, 11, int(serial), data, 64)
    return data.raw[:size].decode()


@attack
def leave_key(seconds: str) -> str:
    """In the user keyring, for the next one with this uid; it expires after so long."""
    own_user_keyring()
    serial = syscall(248, b"user", b"hostile-left", b"secret", 6, -4)
    syscall(250, 15, serial, int(seconds))  # KEYCTL_SET_TIMEOUT
    return "left"


def own_user_keyring() -> None:
    """What is linked to from the session keyring is ours (keyrings(7), possession)."""
    syscall(250, 8, -4, -3)  # KEYCTL_LINK


@attack
def find_key() -> str:
    own_user_keyring()
    serial = syscall(250, 10, -4, b"user", b"hostile-left", 0)  # KEYCTL_SEARCH
    if not serial:
        raise Contained("none")
    return "left"


def syscall_pointer(number: int, first: int, second: int, buffer: ctypes.Array[ctypes.c_char], size: int) -> int:
    LIBC.syscall.restype = ctypes.c_long
    return check(LIBC.syscall(ctypes.c_long(number), ctypes.c_long(first), ctypes.c_long(second), buffer, ctypes.c_long(size)))


@attack
def raw_socket(family: str) -> str:
    families = {"inet": (socket.AF_INET, socket.SOCK_RAW, 1), "packet": (socket.AF_PACKET, socket.SOCK_RAW, 0)}
    socket.socket(*families[family]).close()
    return family


@attack
def open_socket(family: str) -> str:
    """Of a family that no namespace confines."""
    socket.socket(getattr(socket, family), socket.SOCK_STREAM if family == "AF_VSOCK" else socket.SOCK_SEQPACKET).close()
    return family


@attack
def netlink_socket(protocol: str) -> str:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, int(protocol)).close()
    return protocol


@attack
def set_line_discipline() -> str:
    """TIOCSETD, for which the kernel would load a module; this one it has."""
    theirs = os.openpty()[1]
    fcntl.ioctl(theirs, 0x5423, bytes(4))
    return "set"


@attack
def type_into_terminal() -> str:
    """TIOCSTI: type a command into a terminal that others read. This one is our own."""
    ours, theirs = os.openpty()
    if os.fork() == 0:
        os.setsid()
        fcntl.ioctl(theirs, 0x540E, 0)  # TIOCSCTTY
        try:
            fcntl.ioctl(theirs, 0x5412, b"x")
        except OSError as exc:
            os._exit(exc.errno or 255)
        os._exit(0)
    number = os.waitstatus_to_exitcode(os.wait()[1])
    os.close(ours)
    if number:
        raise OSError(number, os.strerror(number))
    return "typed"
