"""Attacks on processes: the host's, the job's pid 1, one's own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import struct
import time

from tests.hostile.inside.base import LIBC, Contained, attack, check, syscall

PTRACE_ATTACH = 16
PIDFD_OPEN, PIDFD_GETFD, PROCESS_VM_READV, PIDFD_SEND_SIGNAL, KCMP = 434, 438, 310, 424, 312


@attack
def send_signal(pid: str, number: str = "0") -> str:
    os.kill(int(pid), int(number))
    return "delivered"


@attack
def trace(pid: str) -> str:
    check(LIBC.ptrace(PTRACE_ATTACH, int(pid), None, None))
    return "attached"


@attack
def trace_own_child() -> str:
    """What a debugger does, and what stays allowed."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
    check(LIBC.ptrace(PTRACE_ATTACH, child, None, None))
    os.waitpid(child, 0)
    os.kill(child, signal.SIGKILL)
    return "attached"


@attack
def peek(pid: str) -> str:
    """Open another process' memory."""
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR))
    return "open"


@attack
def environment_of(pid: str) -> str:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return f"{len(file.read())} bytes"


@attack
def look_at_descriptors(pid: str) -> str:
    return " ".join(os.listdir(f"/proc/{pid}/fd"))


@attack
def root_of(pid: str) -> str:
    return " ".join(os.listdir(f"/proc/{pid}/root/"))


@attack
def helper_program(pid: str) -> str:
    """The helper is one program for all jobs: whoever can open it may find a way to write to it."""
    os.close(os.open(f"/proc/{pid}/exe", os.O_RDONLY))
    return "open"


@attack
def overwrite_helper(pid: str) -> str:
    """Its text would be that of every job's pid 1 (CVE-2019-5736)."""
    os.close(os.open(f"/proc/{pid}/exe", os.O_WRONLY))
    return "open"


@attack
def forge_end(pid: str) -> str:
    """Take the socket that pid 1 tells the shim with, and tell an end that is none: SAY_EXITED, wait status 0 (jobrunner.h).

    A pid 1 that hears no more of the shim leaves, and takes us with it.
    """
    pidfd = syscall(PIDFD_OPEN, int(pid), 0)
    channel = syscall(PIDFD_GETFD, pidfd, 0, 0)
    print("succeeded: told", flush=True)
    with socket.socket(fileno=channel) as stolen:
        stolen.send(struct.pack("Ii", 4, 0))
        stolen.shutdown(socket.SHUT_RDWR)
    time.sleep(600)
    os._exit(3)


@attack
def limit(pid: str) -> str:
    """Take open files away from a process."""
    resource.prlimit(int(pid), resource.RLIMIT_NOFILE, (64, 64))
    return "done"


@attack
def renice(pid: str) -> str:
    """Who hardly runs dies slowly, and with him all whom he ends with."""
    os.setpriority(os.PRIO_PROCESS, int(pid), 19)
    return "done"


@attack
def renice_user() -> str:
    os.setpriority(os.PRIO_USER, os.getuid(), 19)
    return "done"


@attack
def idle(pid: str) -> str:
    os.sched_setscheduler(int(pid), os.SCHED_IDLE, os.sched_param(0))
    return "done"


@attack
def pin(pid: str) -> str:
    """To one processor, which others keep busy."""
    os.sched_setaffinity(int(pid), {min(os.sched_getaffinity(0))})
    return "done"


@attack
def everyone() -> str:
    """SIGKILL to every process that can be seen: a sleeper of our own shows that it is sent."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
    os.kill(-1, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return f"our own died of {os.WTERMSIG(status)}"


@attack
def daemonize(mark: str) -> str:
    """Double fork, a session of its own, every signal ignored, no descriptor kept: what stays is told by its command line."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 32):
                if number not in (signal.SIGKILL, signal.SIGSTOP):
                    signal.signal(number, signal.SIG_IGN)
            os.closerange(0, 100)
            os.execv("/bin/sh", ["sh", "-c", f"trap '' 1 2 3 13 15; sleep 30; : {mark}"])
        os._exit(0)
    os.wait()
    return "gone into the background"


@attack
def ignore_everything() -> str:
    """Every signal that can be ignored or blocked is."""
    for number in range(1, 65):
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
    print("ready", flush=True)
    time.sleep(600)
    return "outlived"


@attack
def stop_everything() -> str:
    """Stop the parent, the siblings and oneself: whoever waits for us waits for ever."""
    for _ in range(3):
        if os.fork() == 0:
            time.sleep(600)
    with contextlib.suppress(PermissionError):
        os.kill(os.getppid(), signal.SIGSTOP)
    print("ready", flush=True)
    os.kill(0, signal.SIGSTOP)
    time.sleep(600)
    return "went on"


@attack
def thread_and_leave(seconds: str) -> str:
    """The main thread ends; the process lives on in another."""
    import threading

    threading.Thread(target=time.sleep, args=(float(seconds),)).start()
    LIBC.syscall(ctypes.c_long(60), ctypes.c_long(0))
    raise Contained("still here")


@attack
def compare(pid: str) -> str:
    """kcmp(2): are its files ours?"""
    return str(syscall(KCMP, os.getpid(), int(pid), 2, 0, 0))


@attack
def read_memory(pid: str, address: str) -> str:
    """process_vm_readv(2) of one byte."""
    buffer = ctypes.create_string_buffer(1)
    local = (ctypes.c_ulong * 2)(ctypes.addressof(buffer), 1)
    remote = (ctypes.c_ulong * 2)(int(address, 16), 1)
    LIBC.process_vm_readv.restype = ctypes.c_long
    check(LIBC.process_vm_readv(int(pid), local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), ctypes.c_ulong(0)))
    return "a byte"
