"""Every system call by its number, each in a child of its own, with arguments that make no sense: what does the kernel say?"""

from __future__ import annotations

import ctypes
import os
import signal

from tests.hostile.inside.base import LIBC, attack

HIGHEST = 480
ENDLESS = {15, 34, 162, 306}
"""rt_sigreturn, pause, sync, syncfs: one needs a frame, the others wait, for a signal or for the host's disks."""


@attack
def every_call() -> str:
    """A line for each: number and errno, 0 if it was done, -1 if the child died of it or waited."""
    LIBC.syscall.restype = ctypes.c_long
    minus = ctypes.c_long(-1)
    for number in range(HIGHEST):
        if number in ENDLESS:
            continue
        child = os.fork()
        if child == 0:
            signal.alarm(2)
            parent = os.getpid()
            result = LIBC.syscall(ctypes.c_long(number), minus, minus, minus, minus, minus, minus)
            error = ctypes.get_errno() if result == -1 else 0
            os._exit(error if os.getpid() == parent else 0)
        status = os.waitpid(child, 0)[1]
        print(number, os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1)
    return f"{HIGHEST} calls"
