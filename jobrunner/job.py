"""What a job is: how it may end, and the one table that says which status an ending means.

No I/O and no clock. Times are seconds since the epoch (float) unless a name ends in `_ns`; sizes are bytes; rates are bytes or
operations per second. Every other module imports these values and none sets a state but through `Job.end`.

    created ──start──► RUNNING ──end(ending)──► COMPLETED | FAILED | TERMINATED
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from jobrunner.limits import Limits, OutputPolicy
from jobrunner.spec import JobSpec, is_job_id, os_bytes, signal_name, signal_number

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
    "Workspace",
    "is_job_id",
    "os_bytes",
    "signal_name",
    "signal_number",
]


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
    network: str = ""
    """`none` or `host`; empty from a server that does not tell."""
    root: str = ""
    writable: bool = False
    volumes: tuple[str, ...] = ()
    workspace: str = ""
    work: str = ""
    """Where /work is: `disk`, bounded there if `limits.work_size` is set, or `memory`; empty from a server that does not tell."""
    runs_as: str = ""
    """The user of the configuration that it asked to be; empty: one that no other job is."""
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


@dataclass(frozen=True, slots=True)
class Workspace:
    """A directory that is kept from one job of a user to the next."""

    user: str
    name: str
    used: float
    """When a job last began with it, seconds since the epoch."""
    size: int | None = None
    """Bytes on disk; None while a job has it and no project quota counts them, because what moves cannot be counted."""
    held_by: str = ""
    """The id of the job that has it; empty if none does."""


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
    work: str = ""
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
            network=self.spec.network or "none",
            root=self.spec.root,
            writable=self.spec.writable,
            volumes=self.spec.volumes,
            workspace=self.spec.workspace,
            work=self.work,
            runs_as=self.spec.user,
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
