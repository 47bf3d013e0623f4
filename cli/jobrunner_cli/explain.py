"""`explain`: what became of a job, which of its limits it met, and what to do about it, in sentences for a person.

Everything said is read from the job's info: nothing is asked of the host, and nothing is guessed from the output.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from jobrunner.job import EndReason, JobInfo, JobStatus
from jobrunner.spec import signal_name
from jobrunner.units import format_duration, format_size
from jobrunner_cli.show import NETWORK_HOST, clean, command_line, ending, moment

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["explain"]

_NEARLY = 0.95
"""A peak above this part of its limit has met it: the kernel takes memory back before it refuses any."""
_HELD_BACK = 0.1
"""Part of its time that a job has to be throttled for before it is worth a word."""

_MEANS = {
    EndReason.LOST: "Nobody saw how it ended, so its exit code is not known. Its output up to then is kept.",
    EndReason.OOM_KILLED: "When the kernel kills one process for memory, the whole job is ended, so that none goes on without it.",
    EndReason.IDLE_TIMEOUT: "A longer --idle-timeout lets it be silent for longer.",
    EndReason.SHUTDOWN: "The server's configuration ends jobs with it (on_shutdown).",
}
_SIGNALS = {
    signal.SIGKILL: "A process of the job sent it, or somebody on its host: neither a limit nor jobrunner did.",
    signal.SIGSEGV: "It used memory that is not its own: a fault of the program.",
    signal.SIGABRT: "It gave up by itself, as after a failed assertion.",
    signal.SIGSYS: "It made a system call that it may not make.",
    signal.SIGXFSZ: "It wrote past the largest size of a file that it may have.",
    signal.SIGPIPE: "It wrote to a pipe that nobody reads.",
}
_SHELLS_CODES = {
    126: "A shell ends with 126 where it found a command and may not execute it.",
    127: "A shell ends with 127 where it did not find a command: is it installed on the server's host, or in the job's root?",
}


def explain(info: JobInfo, now: float | None = None) -> str:
    """Paragraphs: how it ended, why, what it met on its way, what to look at next. `now` in seconds since the epoch."""
    lasted = (info.ended or (time.time() if now is None else now)) - _begun(info)
    parts = [
        f"job {info.job_id}{f' ({clean(info.name)})' if info.name else ''} {_verb(info)}",
        _history(info, lasted),
        "\n".join(_why(info)),
        "\n".join(f"- {text}" for text in _met(info, lasted)),
        f"Its output: jobrunner log {info.job_id}. All that is known of it: jobrunner info {info.job_id}.",
    ]
    return "\n".join(part for part in parts if part)


def _verb(info: JobInfo) -> str:
    return "is running" if info.status == JobStatus.RUNNING else clean(ending(info))


def _begun(info: JobInfo) -> float:
    return info.started or info.created


def _history(info: JobInfo, lasted: float) -> str:
    by = f"{clean(info.user)} started it" if info.user else "It was started"
    ran = f"it ran for {format_duration(round(lasted, 3))}" if info.ended else f"it has run for {format_duration(round(lasted, 1))}"
    return f"{by} at {moment(_begun(info))}, and {ran}: {command_line(info)}"


def _why(info: JobInfo) -> Iterator[str]:
    """What the reason means, where its message does not say it."""
    if info.end_reason in _MEANS:
        yield _MEANS[EndReason(info.end_reason)]
    if info.end_reason == EndReason.SIGNALED and info.signal in _SIGNALS:
        yield _SIGNALS[signal.Signals(info.signal)]
    if info.end_reason == EndReason.EXITED and info.exit_code in _SHELLS_CODES:
        yield _SHELLS_CODES[info.exit_code]
    elif info.end_reason == EndReason.EXITED and info.exit_code is not None and 128 < info.exit_code <= 128 + signal.SIGRTMAX:
        name = signal_name(info.exit_code - 128)
        yield f"A shell ends with {info.exit_code} where {name} ended a command of its own."


def _met(info: JobInfo, lasted: float) -> Iterator[str]:
    """Each bound that the job has felt, and what the host lacks."""
    limits, usage = info.limits, info.usage
    if limits.memory and usage.memory_peak and usage.memory_peak >= _NEARLY * limits.memory:
        yield f"memory: it had {format_size(usage.memory_peak)} of {format_size(limits.memory)} at its peak; --memory gives it more"
    if limits.pids and usage.pids_peak and usage.pids_peak >= limits.pids:
        yield f"processes and threads: it had all {limits.pids} that it may have, and got no more; --pids gives it more"
    if usage.throttled and usage.throttled >= _HELD_BACK * lasted:
        held = format_duration(round(usage.throttled, 1))
        yield f"CPU: its limit of {limits.cpus} held it back for {held}, counted over all CPUs; --cpus gives it more"
    if info.log_start:
        yield f"output: of {info.log_end} bytes the first {info.log_start} are dropped; --output-limit keeps more"
    if info.network == "none" and info.status == JobStatus.FAILED:
        yield f"network: it had none; {NETWORK_HOST}"
    for text in info.missing:
        yield f"this host: {clean(text)}"
