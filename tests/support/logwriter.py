"""Writes a log as docs/formats.md says, byte by byte under the test's control: the shim's writer cannot be made to stop."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

RECORD = struct.Struct("<QqIIQ")
NUMBER_OF = {"stdout": 1, "stderr": 2}
GAP = 2


class LogWriter:
    """`directory` becomes a job's log directory; `offset` counts every byte written or lost."""

    def __init__(self, directory: Path, segment_bytes: int = 1 << 20, checked: bool = True) -> None:
        """Shims of before 1.0 wrote records that are not `checked`."""
        self.directory = directory
        self.checked = checked
        self.segment_bytes = segment_bytes
        self.offset = 0
        self.clock = 1_700_000_000_000_000_000
        directory.mkdir(parents=True, exist_ok=True)
        self.new_segment()

    def new_segment(self) -> None:
        self.base = self.offset
        self.data = self.directory / f"{self.base:016x}"
        self.index = self.directory / f"{self.base:016x}.idx"
        self.data.touch()
        self.index.touch()

    def write(self, stream: str, data: bytes, after_ns: int = 1_000_000) -> None:
        if self.offset - self.base >= self.segment_bytes:
            self.new_segment()
        self.clock += after_ns
        self.append(self.data, data)
        self.offset += len(data)
        self.record(1, NUMBER_OF[stream], len(data))

    def lose(self, count: int) -> None:
        """A write that failed: the segment ends, and the next one begins with a gap record."""
        self.offset += count
        self.new_segment()
        self.record(2, 0, count)

    def end(self) -> None:
        self.record(3, 0)

    def record(self, kind: int, stream: int, count: int = 0) -> None:
        self.append(self.index, pack(self.offset, self.clock, kind, stream, count, self.checked))

    def append(self, path: Path, data: bytes) -> None:
        with path.open("ab") as file:
            file.write(data)


def pack(end: int, time_ns: int, kind: int, stream: int, count: int = 0, checked: bool = True) -> bytes:
    """A record; `count` bytes that a gap has lost, or that data is of."""
    if kind == GAP or not checked:
        return RECORD.pack(end, time_ns, kind, stream, count if kind == GAP else 0)
    raw = RECORD.pack(end, time_ns, kind, stream, count)[:28]
    return raw + zlib.crc32(raw).to_bytes(4, "little")
