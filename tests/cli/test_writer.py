"""The writer against real pipes: every byte, in order, however slowly they are read."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from jobrunner.stdio import OutputClosed, OutputFailed, write_all
from jobrunner_cli.writer import HELD, OutputWriter

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = bytes(range(256)) * 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            continue


class Drain:
    """Reads a pipe to its end in a thread."""

    def __init__(self, fd: int) -> None:
        self.data = b""
        self._fd = fd
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while piece := os.read(self._fd, 3000):
            self.data += piece

    def result(self) -> bytes:
        self._thread.join(20)
        return self.data


@pytest.mark.parametrize("blocking", [True, False])
def test_all_bytes_are_written_to_a_pipe_that_takes_a_part_at_a_time(pipe: tuple[int, int], blocking: bool) -> None:
    os.set_blocking(pipe[1], blocking)
    drain = Drain(pipe[0])
    write_all(pipe[1], DATA)
    os.close(pipe[1])
    assert drain.result() == DATA


def test_a_pipe_without_reader_is_told_as_closed(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    with pytest.raises(OutputClosed):
        write_all(pipe[1], b"x")


def test_a_full_device_is_told_with_its_reason() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OutputFailed, match="No space left on device"):
        write_all(full.fileno(), b"x")


async def test_chunks_arrive_in_the_order_in_which_they_were_handed_over(pipe: tuple[int, int]) -> None:
    drain = Drain(pipe[0])
    writer = OutputWriter()
    chunks = [b"%d\n" % number for number in range(5000)]
    with anyio.fail_after(20):
        for chunk in chunks:
            await writer.write(pipe[1], chunk)
        await writer.drain()
    os.close(pipe[1])
    assert drain.result() == b"".join(chunks)


async def test_a_caller_waits_while_nobody_reads_and_the_loop_runs_on(pipe: tuple[int, int]) -> None:
    writer = OutputWriter()
    handed_over = 0
    with anyio.move_on_after(0.5) as scope:
        while True:
            handed_over += len(DATA)
            await writer.write(pipe[1], DATA)
    assert scope.cancelled_caught
    assert handed_over <= HELD + 2 * len(DATA)
    drain = Drain(pipe[0])
    with anyio.fail_after(20):
        await writer.drain()
    os.close(pipe[1])
    assert len(drain.result()) == handed_over


async def test_an_error_of_the_thread_reaches_the_caller(pipe: tuple[int, int]) -> None:
    writer = OutputWriter()
    os.close(pipe[0])
    await writer.write(pipe[1], b"x")
    with anyio.fail_after(20), pytest.raises(OutputClosed):
        await writer.drain()
