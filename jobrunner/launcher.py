"""The launcher of one start: made first, and told what to start once the job's record is durable.

So the program is executed while the record is on its way to the disk. It holds nothing until it is told, and leaves by itself when
whoever made it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from jobrunner.shim import binary_path
from jobrunner.shim.launch import Report, parse_report

__all__ = ["Launcher"]

GO = b"\n"
REPORT_MAX = 4096
"""Bytes; a report is one line of some hundred (main.c)."""


class Launcher:
    """A process of the helper that waits. Make it with `make`; whoever has it closes it."""

    def __init__(self, process: asyncio.subprocess.Process, items: int, channel: socket.socket) -> None:
        self._process = process
        self._items = items
        self._channel = channel

    @classmethod
    async def make(cls) -> Launcher:
        """One that waits. Raises OSError if it cannot be made."""
        with contextlib.ExitStack() as stack:
            items = os.memfd_create("jobrunner-launch", os.MFD_CLOEXEC)
            stack.callback(os.close, items)
            ours, its = socket.socketpair()
            stack.callback(ours.close)
            ours.setblocking(False)
            with its:
                process = await asyncio.create_subprocess_exec(
                    binary_path(), "wait", stdin=items, stdout=its.fileno(), cwd="/", env={}, start_new_session=True
                )
            stack.pop_all()
        return cls(process, items, ours)

    def prepare(self, items: bytes) -> None:
        """What it is to start. Raises OSError if the list cannot be written."""
        with open(self._items, "wb", closefd=False) as file:
            file.write(items)

    async def run(self) -> Report | None:
        """Have it start that; what it reports once the command has been executed, or once the start has failed and no process of it
        is left. None if it went without a word: what became of the start is not known then.
        """
        heard = b""
        with contextlib.suppress(ConnectionError):  # it was killed
            self._channel.send(GO)
            while not heard.endswith(b"\n") and (part := await asyncio.get_running_loop().sock_recv(self._channel, REPORT_MAX)):
                heard += part
        report = parse_report(heard)
        if report is None or not report.started:
            await self._process.wait()
        return report

    async def close(self) -> None:
        """It leaves by itself: once it has told, or once there is nobody who could tell it anything."""
        self._channel.close()
        os.close(self._items)
        await self._process.wait()
