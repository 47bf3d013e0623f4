"""System calls of other ABIs, which a filter of x86_64 numbers alone would not see: machine code, as Python has none."""

from __future__ import annotations

import ctypes
import mmap

from tests.hostile.inside.base import attack

# push rbx; mov eax, NUMBER; mov ebx, ARGUMENT; int 0x80; pop rbx; ret
INT80 = "53 b8 %s bb %s cd 80 5b c3"


def run(code: bytes) -> int:
    """Execute these bytes; what they leave in rax."""
    memory = mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return int(ctypes.CFUNCTYPE(ctypes.c_long)(address)())


def number(value: int, size: int) -> str:
    return value.to_bytes(size, "little").hex(" ")


def result(value: int) -> str:
    value = ctypes.c_int32(value & 0xFFFFFFFF).value
    if -4096 < value < 0:
        raise OSError(-value, "")
    return f"process {value}"


@attack
def int80() -> str:
    """getpid(2), of the 32-bit table."""
    return result(run(bytes.fromhex(INT80 % (number(20, 4), number(0, 4)))))


@attack
def int80_unshare() -> str:
    """unshare(CLONE_NEWUSER), number 310 of the 32-bit table."""
    return result(run(bytes.fromhex(INT80 % (number(310, 4), number(0x10000000, 4)))))
