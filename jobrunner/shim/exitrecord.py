"""The exit record (docs/formats.md): how a job ended, as its shim wrote it."""

from __future__ import annotations

import enum
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cause", "ExitRecord", "State", "is_newer", "parse_exit", "read_exit"]

LAYOUT = struct.Struct("<6sHIIii16sqqQQQ10Q348xI")
MAGIC, VERSION = b"JREXIT", 1
UNKNOWN = 2**64 - 1
assert LAYOUT.size == 512


class State(enum.IntEnum):
    RUNNING = 1
    ENDED = 2
    FAILED = 3


class Cause(enum.IntEnum):
    NONE = 0
    OWN = 1
    STOPPED = 2
    DEADLINE = 3
    IDLE_TIMEOUT = 4
    OUTPUT_LIMIT = 5
    SHUTDOWN = 6
    OOM_KILLED = 7
    LOST = 8
    LOG_ERROR = 9


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """Times in ns; counters are None where the host did not tell."""

    state: State
    cause: Cause
    wait_status: int
    """As of waitpid(2); -1 if unknown."""
    errno: int
    step: str
    started_ns: int
    ended_ns: int
    wall_ns: int
    log_end: int
    lost: int
    cpu_user_ns: int | None
    cpu_system_ns: int | None
    memory_peak: int | None
    pids_peak: int | None
    read_bytes: int | None
    write_bytes: int | None
    read_ops: int | None
    write_ops: int | None
    throttled_ns: int | None
    oom_kills: int | None


def parse_exit(raw: bytes) -> ExitRecord | None:
    """None for anything that is not a whole record of this version."""
    if len(raw) != LAYOUT.size or zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return None
    magic, version, state, cause, status, errno, step, *numbers, _ = LAYOUT.unpack(raw)
    if (magic, version) != (MAGIC, VERSION):
        return None
    try:
        times, counters = numbers[:5], [None if number == UNKNOWN else number for number in numbers[5:]]
        return ExitRecord(State(state), Cause(cause), status, errno, step.rstrip(b"\0").decode("ascii"), *times, *counters)
    except ValueError:
        return None


def is_newer(raw: bytes) -> bool:
    """Whether this is a whole exit record of a later version, which says how the job ended to servers that know it."""
    if len(raw) < LAYOUT.size or raw[: len(MAGIC)] != MAGIC or zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return False
    return int.from_bytes(raw[len(MAGIC) : len(MAGIC) + 2], "little") > VERSION


def read_exit(path: Path) -> ExitRecord | None:
    """The record in this file; None if there is none, or none that can be believed."""
    try:
        return parse_exit(path.read_bytes())
    except OSError:
        return None
