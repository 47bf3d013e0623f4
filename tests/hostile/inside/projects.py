"""Attacks by attributes of files: whoever owns one could take it out of the project whose quota bounds its directory.

The calls are tried with a flag that anybody may set, as not every file system has projects. Numbers are those of x86_64.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

from tests.hostile.inside.base import LIBC, Contained, attack, check, syscall

GET_FLAGS, SET_FLAGS, SET_FLAGS_32 = 0x80086601, 0x40086602, 0x40046602
GET_ATTRIBUTES, SET_ATTRIBUTES = 0x801C581F, 0x401C5820
ATTRIBUTES = struct.Struct("=5I8x")
NODUMP_FLAG, NODUMP = 0x40, 0x80
HERE, FOLLOW = -100, 0x400
INHERIT_FLAG = 0x20000000
CLONE = 0x40049409
FILE_SETATTR = 469
PIECE = 1 << 20


@attack
def set_flags(path: str, upper_half: str = "0") -> str:
    """FS_IOC_SETFLAGS. The kernel looks at the lower half of the command alone."""
    file = os.open(path, os.O_RDONLY)
    (flags,) = struct.unpack("l", fcntl.ioctl(file, GET_FLAGS, bytes(8)))
    buffer = ctypes.create_string_buffer(struct.pack("l", flags | NODUMP_FLAG))
    syscall(16, file, SET_FLAGS | int(upper_half) << 32, ctypes.addressof(buffer))
    return "nodump"


@attack
def set_attributes(path: str) -> str:
    """FS_IOC_FSSETXATTR."""
    file = os.open(path, os.O_RDONLY)
    flags, *rest = ATTRIBUTES.unpack(fcntl.ioctl(file, GET_ATTRIBUTES, bytes(ATTRIBUTES.size)))
    fcntl.ioctl(file, SET_ATTRIBUTES, ATTRIBUTES.pack(flags | NODUMP, *rest))
    return "nodump"


@attack
def file_setattr(path: str) -> str:
    """file_setattr(2), Linux 6.17: flags, an extent's size, a count, the project, another size."""
    syscall(FILE_SETATTR, -100, path.encode(), struct.pack("=Q4I", NODUMP, 0, 0, 0, 0), 24, 0)
    return "nodump"


@attack
def make_subvolume(path: str) -> str:
    """A file system below this one, and a read-only copy of it: BTRFS_IOC_SUBVOL_CREATE, BTRFS_IOC_SNAP_CREATE_V2."""
    directory = os.open(path, os.O_RDONLY)
    fcntl.ioctl(directory, 0x5000940E, bytearray(struct.pack("q4088s", 0, b"subvolume")))
    os.mkdir(f"{path}/subvolume/inner")
    source = os.open(f"{path}/subvolume", os.O_RDONLY)
    fcntl.ioctl(directory, 0x50009417, bytearray(struct.pack("qQQ32s4040s", source, 0, 2, b"", b"copy")))
    return "made"


@attack
def leave_project(path: str, mib: str) -> str:
    """Out of the project and of what is inherited from it; then more than it may have."""
    file = os.open(path, os.O_RDONLY)
    flags, extent, count, project, cow = ATTRIBUTES.unpack(fcntl.ioctl(file, GET_ATTRIBUTES, bytes(ATTRIBUTES.size)))
    if not project:
        raise Contained("it has none")
    fcntl.ioctl(file, SET_ATTRIBUTES, ATTRIBUTES.pack(flags & ~0x200, extent, count, 0, cow))
    return _fill(os.open(f"{path}/bomb", os.O_WRONLY | os.O_CREAT), mib)


@attack
def stop_inheriting(path: str, mib: str) -> str:
    """A directory whose files would get no project."""
    os.mkdir(f"{path}/out")
    file = os.open(f"{path}/out", os.O_RDONLY)
    (flags,) = struct.unpack("l", fcntl.ioctl(file, GET_FLAGS, bytes(8)))
    if not flags & INHERIT_FLAG:
        raise Contained("it inherits nothing")
    fcntl.ioctl(file, SET_FLAGS, struct.pack("l", flags & ~INHERIT_FLAG))
    return _fill(os.open(f"{path}/out/bomb", os.O_WRONLY | os.O_CREAT), mib)


@attack
def fill_unnamed(path: str, mib: str) -> str:
    """A file that no directory has."""
    return _fill(os.open(path, os.O_WRONLY | os.O_TMPFILE), mib)


@attack
def rename(source: str, target: str) -> str:
    os.rename(f"{source}/large", f"{target}/large")
    return "moved"


@attack
def link(source: str, target: str) -> str:
    os.link(f"{source}/large", f"{target}/large")
    return "linked"


@attack
def link_unnamed(source: str, target: str) -> str:
    """A file that was made elsewhere, and gets its first name here."""
    file = os.open(source, os.O_WRONLY | os.O_TMPFILE)
    # Python's own os.link() would link the name in /proc.
    check(LIBC.linkat(HERE, f"/proc/self/fd/{file}".encode(), HERE, f"{target}/unnamed".encode(), FOLLOW))
    return "linked"


@attack
def clone(source: str, target: str) -> str:
    """What two files share takes the disk once (ioctl_ficlone(2)); whoever shares it has it on his account."""
    file = os.open(f"{target}/large", os.O_WRONLY | os.O_CREAT)
    fcntl.ioctl(file, CLONE, os.open(f"{source}/large", os.O_RDONLY))
    return "cloned"


def _fill(file: int, mib: str) -> str:
    written = sum(os.write(file, b"\1" * PIECE) for _ in range(int(mib)))
    return f"{written // PIECE} MiB"
