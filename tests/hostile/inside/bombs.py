"""Attacks by quantity. Each has an end of its own, small enough for the host to bear where no limit holds it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import time

from tests.hostile.inside.base import LIBC, Contained, attack, check

PIECE = 1 << 20
HELD: list[mmap.mmap] = []
"""Not given back before the process ends."""


@attack
def forks(count: str) -> str:
    """So many children at once, each a sleeper in a session of its own."""
    made = []
    try:
        for _ in range(int(count)):
            pid = os.fork()
            if pid == 0:
                os.setsid()
                for number in range(1, 32):
                    if number not in (signal.SIGKILL, signal.SIGSTOP):
                        signal.signal(number, signal.SIG_IGN)
                time.sleep(600)
                os._exit(0)
            made.append(pid)
    finally:
        print(len(made), "children", flush=True)
    return f"{len(made)} children"


@attack
def fork_for_ever() -> None:
    """Everybody, all the time, with every signal ignored that can be."""
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
    while True:
        with contextlib.suppress(OSError):
            os.fork()


@attack
def memory(mib: str) -> str:
    """Anonymous pages, each written to."""
    for _ in range(int(mib)):
        piece = mmap.mmap(-1, PIECE)
        piece.write(b"\1" * PIECE)
        HELD.append(piece)
    return f"{len(HELD)} MiB"


@attack
def memory_of_children(mib: str, children: str) -> str:
    """Each child alone is within the limit."""
    reading, writing = os.pipe()
    for _ in range(int(children)):
        if os.fork() == 0:
            memory(mib)
            os.write(writing, b".")
            time.sleep(600)
    for _ in range(int(children)):
        os.read(reading, 1)
    return "all of them"


@attack
def fill(path: str, mib: str) -> str:
    """One file of so many MiB."""
    with open(path, "wb", buffering=0) as file:
        for done in range(int(mib)):
            rest = b"\1" * PIECE
            while rest:
                try:
                    rest = rest[file.write(rest) :]
                except OSError as exc:
                    print(done, "MiB written", flush=True)
                    raise exc
    return f"{mib} MiB"


@attack
def memfd(mib: str) -> str:
    """A file that has no name and is on no mount that can be sized."""
    fd = os.memfd_create("bomb")
    for _ in range(int(mib)):
        os.write(fd, b"\1" * PIECE)
    return f"{mib} MiB"


@attack
def shared_memory(mib: str) -> str:
    """A System V segment: it would outlive its process."""
    size = int(mib) * PIECE
    identity = check(LIBC.shmget(0, ctypes.c_size_t(size), 0o1600))
    LIBC.shmat.restype = ctypes.c_void_p
    address = LIBC.shmat(identity, None, 0)
    ctypes.memset(address, 1, size)
    return f"{mib} MiB"


@attack
def descriptors(count: str) -> str:
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(int(count))]
    return f"{len(held)} descriptors"


@attack
def names(directory: str, count: str) -> str:
    """Empty files: nothing but inodes."""
    for number in range(int(count)):
        os.close(os.open(f"{directory}/{number}", os.O_WRONLY | os.O_CREAT))
    return f"{count} names"


@attack
def flood(mib: str) -> str:
    """Output without end, on both streams."""
    line = b"x" * 65535 + b"\n"
    for number in range(int(mib) * 16):
        os.write(1 + number % 2, line)
    return f"{mib} MiB"


@attack
def crash() -> str:
    """A core file in the working directory, if there may be one."""
    import resource

    before = set(os.listdir())
    child = os.fork()
    if child == 0:
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
        os.kill(os.getpid(), signal.SIGSEGV)
    status = os.waitpid(child, 0)[1]
    left = set(os.listdir()) - before
    if not os.WCOREDUMP(status) and not left:
        raise Contained("no core")
    return "a core"


@attack
def hog_keys(count: str) -> str:
    """Keys are the kernel's memory, on nobody's cgroup."""
    LIBC.syscall.restype = ctypes.c_long
    for number in range(int(count)):
        check(LIBC.syscall(ctypes.c_long(248), b"user", f"hog{number}".encode(), b"x" * 64, ctypes.c_long(64), ctypes.c_long(-3)))
    return f"{count} keys"


@attack
def spin(seconds: str, processes: str) -> str:
    """CPU time of so many processes, in seconds."""
    begun = time.monotonic()
    children = []
    for _ in range(int(processes)):
        pid = os.fork()
        if pid == 0:
            while time.monotonic() - begun < float(seconds):
                pass
            os._exit(0)
        children.append(pid)
    for _ in children:
        os.wait()
    return str(sum(os.times()[2:4]))
