"""What a job is: what was asked for, how it may end, and the one table that says which status an ending means.

No I/O and no clock. Times are seconds since the epoch (float) unless a name ends in `_ns`; sizes are bytes; rates are bytes or
operations per second. Every other module imports these values and none sets a state but through `Job.end`.

    created ──start──► RUNNING ──end(ending)──► COMPLETED | FAILED | TERMINATED
"""

from __future__ import annotations

import enum
import functools
import re
import signal as signals
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

from jobrunner.errors import InvalidRequest

__all__ = [
    "STATUS_OF",
    "EndReason",
    "Ending",
    "Gap",
    "Job",
    "JobInfo",
    "JobSpec",
    "JobStatus",
    "Limits",
    "OutputPolicy",
    "Stream",
    "Usage",
    "is_job_id",
    "signal_name",
    "signal_number",
]

MAX_ARG = 131071
"""Longest argument or NAME=VALUE, in bytes without its NUL: MAX_ARG_STRLEN - 1, execve(2)."""
MAX_ARGS_TOTAL = 1 << 20
"""Bytes of all arguments and the environment together; half of what the kernel takes with an 8 MiB stack (execve(2))."""
MAX_ARGS = 32_000
"""Arguments, and half as many variables: what can be asked for can also be answered in one message (wire/codec.py)."""
MAX_NAME = 128
MAX_LABELS = 64
MAX_SECONDS = 10 * 365 * 86400.0
MAX_SIZE = 1 << 62
MIN_MEMORY = 1 << 20
MIN_OUTPUT = 1 << 16
"""The shim writes and drops in eighths of the limit, and no less than 4 KiB at once."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ENV_NAME = re.compile(r"[^=\0]+")


class JobStatus(enum.StrEnum):
    """The four words of the original design."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    TERMINATED = "terminated"


class EndReason(enum.StrEnum):
    """Why a job ended. Clients tolerate words that they do not know."""

    EXITED = "exited"
    SIGNALED = "signaled"
    OOM_KILLED = "oom_killed"
    LOST = "lost"
    STOPPED = "stopped"
    DEADLINE = "deadline"
    IDLE_TIMEOUT = "idle_timeout"
    OUTPUT_LIMIT = "output_limit"
    LOG_ERROR = "log_error"
    SHUTDOWN = "shutdown"


STATUS_OF: Mapping[EndReason, JobStatus] = MappingProxyType(
    {
        EndReason.EXITED: JobStatus.FAILED,  # with code 0: completed, see Ending.status
        EndReason.SIGNALED: JobStatus.FAILED,
        EndReason.OOM_KILLED: JobStatus.FAILED,
        EndReason.LOST: JobStatus.FAILED,
        EndReason.STOPPED: JobStatus.TERMINATED,
        EndReason.DEADLINE: JobStatus.TERMINATED,
        EndReason.IDLE_TIMEOUT: JobStatus.TERMINATED,
        EndReason.OUTPUT_LIMIT: JobStatus.TERMINATED,
        EndReason.LOG_ERROR: JobStatus.TERMINATED,
        EndReason.SHUTDOWN: JobStatus.TERMINATED,
    }
)


class Stream(enum.StrEnum):
    """One of a job's two output streams."""

    STDOUT = "stdout"
    STDERR = "stderr"


class OutputPolicy(enum.StrEnum):
    """What happens when a job has written more than its output limit."""

    DROP_OLDEST = "drop-oldest"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one job; None means the server's default, and in a job's info: no such limit."""

    cpus: float | None = None
    """CPU time per wall time, 1.5 is one and a half processors."""
    memory: int | None = None
    """Bytes of memory, without swap."""
    pids: int | None = None
    """Tasks (processes and threads) at once, pid 1 of the job included."""
    read_bps: int | None = None
    write_bps: int | None = None
    read_iops: int | None = None
    write_iops: int | None = None
    open_files: int | None = None
    """Open file descriptors of one process (RLIMIT_NOFILE, getrlimit(2))."""
    tmp_size: int | None = None
    timeout: float | None = None
    """Seconds of wall time until the job is ended, reason `deadline`."""
    idle_timeout: float | None = None
    """Seconds without output until the job is ended, reason `idle_timeout`."""
    output_limit: int | None = None
    """Bytes of output kept on the server's disk, its index included."""
    output_policy: OutputPolicy | None = None

    def __post_init__(self) -> None:
        _check_number("limits.cpus", self.cpus, 0.01, 4096.0)
        _check_count("limits.memory", self.memory, MIN_MEMORY, MAX_SIZE)
        _check_count("limits.pids", self.pids, 2, 1 << 22)
        for name in ("read_bps", "write_bps", "read_iops", "write_iops", "open_files", "tmp_size"):
            _check_count(f"limits.{name}", getattr(self, name), 1, MAX_SIZE)
        _check_count("limits.output_limit", self.output_limit, MIN_OUTPUT, MAX_SIZE)
        _check_number("limits.timeout", self.timeout, 0.001, MAX_SECONDS)
        _check_number("limits.idle_timeout", self.idle_timeout, 0.001, MAX_SECONDS)

    def over(self, defaults: Limits) -> Limits:
        """These limits, with the defaults' values wherever none is set here."""
        missing = {f.name: getattr(defaults, f.name) for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **missing)

    def check_ceilings(self, ceilings: Limits) -> None:
        """Raise InvalidRequest for the first limit that is above its ceiling, or unset where a ceiling is."""
        for f in fields(self):
            ceiling, value = getattr(ceilings, f.name), getattr(self, f.name)
            if ceiling is None or isinstance(ceiling, OutputPolicy):
                continue
            if value is None:
                raise InvalidRequest(f"limits.{f.name}", f"must be set, the server's ceiling is {ceiling}")
            if value > ceiling:
                raise InvalidRequest(f"limits.{f.name}", f"{value} is above the server's ceiling, {ceiling}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise InvalidRequest(name, f"{value!r} is not a number")
    if not low <= value <= high:
        raise InvalidRequest(name, f"{value} is not between {low} and {high}")


def _check_count(name: str, value: int | None, low: int, high: int) -> None:
    _check_number(name, value, low, high)
    if value is not None and not isinstance(value, int):
        raise InvalidRequest(name, f"{value!r} is not a whole number")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a caller asks for. Checked once, here; whoever holds a JobSpec holds a valid one."""

    command: str
    args: tuple[str, ...] = ()
    name: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    limits: Limits = field(default_factory=Limits)
    labels: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""
    merge: bool = False
    stop_signal: str = "TERM"
    grace: float | None = None
    """Seconds between the stop signal and the kill; None means the server's default."""
    root: str = ""
    writable: bool = False
    network: str = ""
    user: str = ""
    volumes: tuple[str, ...] = ()
    """Each `NAME` or `NAME:ro`."""
    workspace: str = ""
    stdin: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "volumes", tuple(self.volumes))
        object.__setattr__(self, "env", MappingProxyType(dict(self.env)))
        object.__setattr__(self, "labels", MappingProxyType(dict(self.labels)))
        if not self.command:
            raise InvalidRequest("command", "must not be empty")
        _check_text("command", self.command)
        if len(self.args) > MAX_ARGS:
            raise InvalidRequest("args", f"{len(self.args)} are more than {MAX_ARGS}")
        if len(self.env) > MAX_ARGS // 2:
            raise InvalidRequest("env", f"{len(self.env)} variables are more than {MAX_ARGS // 2}")
        for index, arg in enumerate(self.args):
            _check_text(f"args[{index}]", arg)
        for name, value in self.env.items():
            if not _ENV_NAME.fullmatch(name):
                raise InvalidRequest("env", f"{name!r} is no name of a variable")
            _check_text(f"env[{name}]", f"{name}={value}")
        total = sum(len(os_bytes(text)) + 9 for text in (self.command, *self.args))
        total += sum(len(os_bytes(name)) + len(os_bytes(value)) + 10 for name, value in self.env.items())
        if total > MAX_ARGS_TOTAL:
            raise InvalidRequest("args", f"{total} bytes with env are more than the {MAX_ARGS_TOTAL} that can be passed")
        if self.cwd and not self.cwd.startswith("/"):
            raise InvalidRequest("cwd", f"{self.cwd!r} is not absolute")
        _check_text("cwd", self.cwd)
        if self.name and not (len(self.name) <= MAX_NAME and _NAME.fullmatch(self.name)):
            raise InvalidRequest("name", f"{self.name!r} is not 1 to {MAX_NAME} of A-Z a-z 0-9 _ . - from a letter or digit on")
        if len(self.labels) > MAX_LABELS:
            raise InvalidRequest("labels", f"{len(self.labels)} are more than {MAX_LABELS}")
        for name, value in self.labels.items():
            if not 0 < len(name) <= MAX_NAME or len(value) > 1024 or "\0" in name + value:
                raise InvalidRequest("labels", f"{name!r} is too long, empty or has a NUL")
        if len(self.request_id) > MAX_NAME or "\0" in self.request_id:
            raise InvalidRequest("request_id", f"is longer than {MAX_NAME} characters or has a NUL")
        signal_number(self.stop_signal)
        _check_number("grace", self.grace, 0, 86400)


def os_bytes(text: str) -> bytes:
    """The bytes that the kernel is given for a text: UTF-8, undecodable bytes kept (PEP 383)."""
    return text.encode("utf-8", "surrogateescape")


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise InvalidRequest(name, "must not contain a NUL byte")
    if len(os_bytes(text)) > MAX_ARG:
        raise InvalidRequest(name, f"{len(os_bytes(text))} bytes are more than the {MAX_ARG} that the kernel takes")


def signal_number(name: str) -> int:
    """The number of a signal given as `TERM`, `SIGTERM` or `15`; InvalidRequest if it is none or cannot stop a job."""
    text = name.upper().removeprefix("SIG")
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else signals.Signals.__members__.get(f"SIG{text}", 0)
    if number not in _stopping_signals():
        raise InvalidRequest("stop_signal", f"{name!r} is no signal that a job can be stopped with")
    return int(number)


@functools.cache
def _stopping_signals() -> frozenset[int]:
    """Numbers; kept, because `valid_signals` makes 64 enum members each time it is asked."""
    return frozenset(map(int, signals.valid_signals())) - {signals.SIGSTOP, signals.SIGCHLD}


def signal_name(number: int) -> str:
    """`SIGTERM` for 15; `signal 64` where it has no name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def is_job_id(text: str) -> bool:
    """Whether this text has the form of a job id: 12 lower-case hexadecimal characters."""
    return re.fullmatch(r"[0-9a-f]{12}", text) is not None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a job has used; None where the host does not tell."""

    cpu_user: float | None = None
    """Seconds."""
    cpu_system: float | None = None
    memory: int | None = None
    """Bytes now; None when the job has ended."""
    memory_peak: int | None = None
    pids: int | None = None
    pids_peak: int | None = None
    read_bytes: int | None = None
    write_bytes: int | None = None
    read_ops: int | None = None
    write_ops: int | None = None
    throttled: float | None = None
    """Seconds during which the CPU limit held the job back."""
    oom_kills: int | None = None
    wall: float | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """A part of the log that is not there: bytes `first` to `last`, both included.

    `reason`: `dropped` to hold the output limit, `output_limit` past the one that ended the job, `write_error` (the disk was full),
    `lost` (the host crashed before they were on disk).
    """

    first: int
    last: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended: decided once, by its shim's exit record."""

    reason: EndReason
    ended: float
    exit_code: int | None = None
    signal: int | None = None
    stopped_by: str = ""
    usage: Usage = field(default_factory=Usage)
    log_end: int = 0
    """Bytes the job wrote, by its shim's count: more than the log shows if the disk was full at the end. 0 if unknown."""

    @property
    def status(self) -> JobStatus:
        if self.reason is EndReason.EXITED and self.exit_code == 0:
            return JobStatus.COMPLETED
        return STATUS_OF[self.reason]


@dataclass(frozen=True, slots=True)
class JobInfo:
    """Everything known of a job at one moment; the same value in the library, in the SDK and, by `to_wire`, on the wire."""

    job_id: str
    status: JobStatus
    command: str
    args: tuple[str, ...] = ()
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    """Who started it: the CN of the client's certificate."""
    node: str = ""
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    end_reason: EndReason | str | None = None
    exit_code: int | None = None
    signal: int | None = None
    limits: Limits = field(default_factory=Limits)
    missing: tuple[str, ...] = ()
    """What the host lacks and the configuration allows to be missing, or cannot do in full; one sentence each."""
    usage: Usage = field(default_factory=Usage)
    log_start: int = 0
    """The first offset that is still there."""
    log_end: int = 0
    stopped_by: str = ""
    message: str = ""
    """One sentence: why it ended, and the remedy."""


@dataclass(slots=True)
class Job:
    """One job's state. `end` is the only way out of RUNNING, and is taken once."""

    job_id: str
    spec: JobSpec
    limits: Limits
    user: str = ""
    node: str = ""
    created: float = 0.0
    started: float | None = None
    missing: tuple[str, ...] = ()
    ending: Ending | None = None

    @property
    def status(self) -> JobStatus:
        return self.ending.status if self.ending else JobStatus.RUNNING

    def end(self, ending: Ending) -> None:
        """Take the job to its last state. A second ending is a bug of the caller and changes nothing."""
        if self.ending is not None:
            raise AssertionError(f"job {self.job_id} has ended already: {self.ending}")
        self.ending = ending

    def message(self) -> str:
        """One sentence about how it ended; empty while it runs."""
        return describe(self.ending, self.limits) if self.ending else ""

    def info(self, usage: Usage, log_start: int, log_end: int) -> JobInfo:
        """The job as one value; `usage` counts while it runs, the ending's own after that."""
        ending = self.ending
        return JobInfo(
            job_id=self.job_id,
            status=self.status,
            command=self.spec.command,
            args=self.spec.args,
            name=self.spec.name,
            labels=self.spec.labels,
            user=self.user,
            node=self.node,
            created=self.created,
            started=self.started,
            ended=ending.ended if ending else None,
            end_reason=ending.reason if ending else None,
            exit_code=ending.exit_code if ending else None,
            signal=ending.signal if ending else None,
            limits=self.limits,
            missing=self.missing,
            usage=ending.usage if ending else usage,
            log_start=log_start,
            log_end=max(log_end, ending.log_end) if ending else log_end,
            stopped_by=ending.stopped_by if ending else "",
            message=self.message(),
        )


def describe(ending: Ending, limits: Limits) -> str:
    """One sentence: how a job ended, and what would have helped."""
    how = f"exit code {ending.exit_code}" if ending.exit_code is not None else ""
    how = f"killed by {signal_name(ending.signal)}" if ending.signal is not None else how
    tail = f" ({how})" if how else ""
    match ending.reason:
        case EndReason.EXITED | EndReason.SIGNALED:
            return how
        case EndReason.OOM_KILLED:
            peak = f", peak {ending.usage.memory_peak} bytes" if ending.usage.memory_peak is not None else ""
            return f"out of memory: the limit is {limits.memory} bytes{peak}; start it with a higher memory limit"
        case EndReason.LOST:
            return "lost: the host restarted, or a process that supervised the job was killed, so how it ended is unknown"
        case EndReason.STOPPED:
            return f"stopped by {ending.stopped_by or 'an unknown user'}{tail}"
        case EndReason.DEADLINE:
            return f"ended at its deadline of {limits.timeout} s{tail}; start it with a longer timeout"
        case EndReason.IDLE_TIMEOUT:
            return f"ended after {limits.idle_timeout} s without output{tail}"
        case EndReason.OUTPUT_LIMIT:
            how_to = "start it with a higher output limit, or with the output policy drop-oldest"
            return f"ended at its output limit of {limits.output_limit} bytes{tail}; {how_to}"
        case EndReason.LOG_ERROR:
            how_to = "make room in the server's state directory, or configure on_write_error = continue"
            return f"ended because its output could not be written{tail}; {how_to}"
        case EndReason.SHUTDOWN:
            return f"ended because the server was shut down{tail}"
