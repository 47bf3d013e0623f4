"""Attacks by programs that the kernel compiles and keeps for whoever asks: filters of sockets and of system calls.

Their memory is one pool of the host's, net.core.bpf_jit_limit. Numbers are those of x86_64.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct

from tests.hostile.inside.base import attack, syscall

LOAD_LENGTH, RETURN = struct.pack("HBBI", 0x80, 0, 0, 0), struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
LOAD_NUMBER = struct.pack("HBBI", 0x20, 0, 0, 0)
PRCTL, NO_NEW_PRIVS = 157, 38
SECCOMP, SET_MODE_FILTER, NEW_LISTENER = 317, 1, 8


class Program:
    """struct sock_fprog, and the instructions that it points at."""

    def __init__(self, *instructions: bytes) -> None:
        self._code = ctypes.create_string_buffer(b"".join(instructions))
        self.head = struct.pack("HxxxxxxQ", len(instructions), ctypes.addressof(self._code))


@attack
def attach(option: str) -> str:
    """By that option of setsockopt(2); the socket keeps it."""
    program = Program(*[LOAD_LENGTH] * 1000, RETURN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as held:
        held.setsockopt(socket.SOL_SOCKET, int(option), program.head)
    return "attached"


def no_new_privileges() -> None:
    """What only root may do without."""
    syscall(PRCTL, NO_NEW_PRIVS, 1, 0, 0, 0)


@attack
def keep() -> str:
    """A filter of one's own that a descriptor keeps."""
    no_new_privileges()
    program = Program(LOAD_NUMBER, RETURN)
    os.close(syscall(SECCOMP, SET_MODE_FILTER, NEW_LISTENER, program.head))
    return "kept"


@attack
def confine_oneself() -> str:
    """What browsers and sandboxes do, and what stays allowed."""
    no_new_privileges()
    program = Program(LOAD_NUMBER, RETURN)
    syscall(SECCOMP, SET_MODE_FILTER, 0, program.head)
    return "confined"
