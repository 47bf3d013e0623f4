"""What every hostile program begins with. It runs inside a job, where there is nothing but the host's python3 and its library.

An attack is a function of texts. It returns when it has had its way, raises OSError where the kernel refused, and Contained where
it was given something else than it wanted.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable

Attack = Callable[..., object]
ATTACKS: dict[str, Attack] = {}
LIBC = ctypes.CDLL(None, use_errno=True)
REFUSED = 77


class Contained(Exception):
    """The attack came to nothing, without an error of the kernel's."""


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


def check(result: int) -> int:
    """OSError if a call of libc's failed."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def syscall(number: int, *args: int | bytes | None) -> int:
    """A system call by its number (x86_64), around libc."""
    LIBC.syscall.restype = ctypes.c_long
    plain = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return check(LIBC.syscall(ctypes.c_long(number), *plain))


def reached(number: int, *args: int | bytes | None) -> str:
    """A call with arguments that make no sense: whoever may call it hears so, everybody else EPERM or ENOSYS."""
    try:
        syscall(number, *args)
    except OSError as exc:
        if exc.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            raise
        return f"the kernel looked at the arguments: {errno.errorcode[exc.errno or 0]}"
    return "it was done"


def series(attacks: str) -> None:
    """Many attacks in one job, each in a process of its own: `== NUMBER` before the lines of each."""
    for number, words in enumerate(json.loads(attacks)):
        print("==", number, flush=True)
        child = os.fork()
        if child == 0:
            main(*words)
        os.waitpid(child, 0)


def main(name: str, *args: str) -> None:
    """Tell how it went in one last line, and by the exit code."""
    if name == "series":
        return series(*args)
    try:
        result = ATTACKS[name](*args)
    except OSError as exc:
        print("refused:", errno.errorcode.get(exc.errno or 0, str(exc)), flush=True)
    except Contained as exc:
        print("refused:", exc, flush=True)
    else:
        print("succeeded:", result, flush=True)
        os._exit(0)
    sys.stdout.flush()
    os._exit(REFUSED)
