"""A job's output to this process's own, byte by byte, and `run`: start, follow, stop on Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

import anyio

from jobrunner.errors import InternalError, JobRunnerError
from jobrunner.job import EndReason, Gap, JobInfo, JobSpec, Stream
from jobrunner.stdio import STDERR, STDOUT, OutputClosed, OutputFailed
from jobrunner_cli.exitcodes import INTERRUPTED, job_exit_code
from jobrunner_cli.session import warn
from jobrunner_cli.show import ending, hint
from jobrunner_cli.stamp import Stamper
from jobrunner_cli.writer import OutputWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from jobrunner.client import ClientJob, JobClient
    from jobrunner.output import Chunk, End, OutputReader

__all__ = ["copy_output", "run_job"]

FD = {Stream.STDOUT: STDOUT, Stream.STDERR: STDERR}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
UNFINISHED = 0.2
"""Seconds that the beginning of a line waits for its rest before it is shown with its stamp: it may be a question."""


async def copy_output(reader: OutputReader, stamper: Stamper | None = None) -> End:
    """Write all that a reader gives, with stamps if there is a stamper; returns, or raises the reader's error, when it is written.

    Gaps are told on standard error.
    """
    _keep_heap()
    writer = OutputWriter()
    try:
        await _copy(reader, writer, stamper)
    except JobRunnerError:  # what came before it is output all the same
        await _finish(writer, stamper)
        raise
    await _finish(writer, stamper)
    if reader.end is None:
        raise InternalError("cannot read log: it stopped without its end")
    return reader.end


async def _copy(reader: OutputReader, writer: OutputWriter, stamper: Stamper | None) -> None:
    async with reader:
        while (part := await _next(reader, writer, stamper)) is not None:
            if isinstance(part, Gap):
                await _write(writer, stamper.finish() if stamper is not None else ())
                text = f"jobrunner: bytes {part.first} to {part.last} of the output are not there: {part.reason}\n"
                await writer.write(STDERR, text.encode())
            elif stamper is None:
                await writer.write(FD[part.stream], part.data)
            else:
                await _write(writer, stamper.feed(part))


async def _finish(writer: OutputWriter, stamper: Stamper | None) -> None:
    await _write(writer, stamper.finish() if stamper is not None else ())
    await writer.drain()


async def _next(reader: OutputReader, writer: OutputWriter, stamper: Stamper | None) -> Chunk | Gap | None:
    """The next part, None at the end. What the stamper holds is written if that is long in coming."""
    if stamper:
        with anyio.move_on_after(UNFINISHED):
            return await anext(reader, None)
        await _write(writer, stamper.flush())
    return await anext(reader, None)


async def _write(writer: OutputWriter, pieces: Iterable[tuple[Stream, bytes]]) -> None:
    for stream, data in pieces:
        await writer.write(FD[stream], data)


async def run_job(client: JobClient, spec: JobSpec) -> int:
    """Start a job, copy its output, and return the exit code that stands for its end.

    The first SIGINT, SIGTERM or SIGHUP (the terminal is gone) stops the job, and its output is followed to its end; the second
    leaves at once.
    """
    with _interrupts() as interrupted:
        job = await client.start(spec)
        try:
            info = await _follow(job, interrupted)
        except (OutputClosed, OutputFailed):
            # What it writes goes nowhere: it ends, as it would have ended on this host.
            await job.stop()
            raise
    if info.end_reason != EndReason.EXITED:
        warn(f"job {job.job_id} {ending(info)}")
    if text := hint(info):
        warn(text)
    return job_exit_code(info)


async def _follow(job: ClientJob, interrupted: asyncio.Event) -> JobInfo:
    async def stop_when_interrupted() -> None:
        await interrupted.wait()
        warn(f"stopping job {job.job_id}; interrupt again to leave it")
        await job.stop()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stop_when_interrupted)
            end = await copy_output(job.log())
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise _first(group) from group
    return end.info or await job.wait()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first real error: what is raised within a task group comes out in a group."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


@contextlib.contextmanager
def _interrupts() -> Iterator[asyncio.Event]:
    """Set by the first of these signals; the second ends the process. On systems without such handlers Ctrl-C just leaves.

    What was ignored when this process was started stays so: as with `nohup`, and Ctrl-C for what a shell runs in the background.
    """
    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def interrupt() -> None:
        if event.is_set():
            # Not by an exception: a blocked write, or a stop that waits for its grace period, must not hold this back.
            warn("left; the job may still be running")
            os._exit(INTERRUPTED)
        event.set()

    there = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__]
    numbers = [number for number in there if signal.getsignal(number) is not signal.SIG_IGN]
    try:
        for number in numbers:
            loop.add_signal_handler(number, interrupt)
    except NotImplementedError:
        yield event
        return
    try:
        yield event
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _keep_heap() -> None:
    """Let glibc keep freed memory: a reader frees and takes 256 KiB for every read. mallopt(3); other C libraries have none."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
