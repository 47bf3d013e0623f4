"""Attacks on what the kernel has once for everybody. Numbers of system calls are those of x86_64."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import time

from tests.hostile.inside.base import LIBC, attack, check, syscall

MAP_HUGETLB, MFD_HUGETLB = 0x40000, 4
HUGE_PAGE = 2 << 20


@attack
def aio_context() -> str:
    context = ctypes.create_string_buffer(8)
    syscall(206, 1, context.raw)
    return "a context"


@attack
def map_huge() -> str:
    with mmap.mmap(-1, HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB) as memory:
        memory[0] = 1
    return "a huge page"


@attack
def huge_file() -> str:
    fd = check(LIBC.memfd_create(b"huge", MFD_HUGETLB))
    os.ftruncate(fd, HUGE_PAGE)
    with mmap.mmap(fd, HUGE_PAGE) as memory:
        memory[0] = 1
    return "a huge page"


def open_terminals(count: int) -> list[int]:
    held: list[int] = []
    with contextlib.suppress(OSError):
        while len(held) < count:
            held.append(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))
    return held


@attack
def terminals(count: str) -> str:
    return str(len(open_terminals(int(count))))


@attack
def keep_terminals(count: str) -> None:
    held = open_terminals(int(count))
    print(len(held), "terminals", flush=True)
    time.sleep(600)


@attack
def fill_sockets(mib: str) -> None:
    """Connections to oneself, that are written to and not read from: the bytes stay in the kernel."""
    held, total, refusals = [], 0, 0
    server = socket.create_server(("127.0.0.1", 0))
    while total < int(mib) << 20 and refusals < 50:
        pair = socket.create_connection(server.getsockname()), server.accept()[0]
        held.append(pair)
        before = total
        for end in pair:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            end.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    total += end.send(bytes(1 << 16))
        refusals += total - before < 1 << 16
    print(total >> 20, "MiB", flush=True)
    time.sleep(600)


@attack
def fill_netlink(mib: str) -> None:
    """The same by NETLINK_USERSOCK, which anybody may send by. It is on nobody's account."""
    held, total = [], 0
    sender = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 2)
    sender.setblocking(False)
    while total < int(mib) << 20:
        held.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 2))
        held[-1].bind((0, 0))
        held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        with contextlib.suppress(BlockingIOError):
            while True:
                total += sender.sendto(bytes(1 << 16), held[-1].getsockname())
    print(total >> 20, "MiB", flush=True)
    time.sleep(600)
