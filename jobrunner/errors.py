"""Every error that jobrunner raises on purpose, and whose fault each one is.

    JobRunnerError
    ├── CallerError                 the caller asked for something that cannot be
    │   ├── InvalidRequest          a field has a value that no job can have
    │   ├── JobNotFound             no job has this id
    │   ├── JobRemoved              a start that was asked for again: its job has been removed
    │   ├── RequestConflict         this request id was used for another request
    │   └── OffsetOutOfRange        past the end of the log of an ended job
    ├── AccessError                 the peer may not do this
    │   ├── Unauthenticated         who is calling could not be established
    │   └── PermissionDenied        the caller's role does not allow it
    ├── StartFailed                 the command or the host: says the step and the reason
    ├── StopFailed                  the host: the job's processes do not go away
    ├── LimitReached                a bound of the server was met; says which
    ├── HostError                   the host lacks what jobs need; says the remedy
    ├── ConfigError                 a setting, or a file that it names, on this side; says which and what is wrong with it
    ├── CertificateError            a certificate, key or CA's directory on this side; says what is wrong and the remedy
    ├── Unavailable                 the server is away or draining; try again later
    ├── Timeout                     the caller's own deadline passed
    ├── Unsupported                 the other side is too old to know this
    ├── InternalError               a bug in jobrunner
    └── WouldBlock                  nobody's: no line is there yet

Each class composes its own message, `cannot VERB OBJECT: reason`, from the values it is given, so that the library, the
server, the SDK and the CLI say the same words. `message` is that text.
"""

from __future__ import annotations

import os

__all__ = [
    "AccessError",
    "CallerError",
    "CertificateError",
    "ConfigError",
    "HostError",
    "InternalError",
    "InvalidRequest",
    "JobNotFound",
    "JobRemoved",
    "JobRunnerError",
    "LimitReached",
    "OffsetOutOfRange",
    "PermissionDenied",
    "RequestConflict",
    "StartFailed",
    "StopFailed",
    "Timeout",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
    "WouldBlock",
]


class JobRunnerError(Exception):
    """Anything that jobrunner raises on purpose; `message` is one line that a person can act on."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CallerError(JobRunnerError):
    """The caller asked for something that cannot be; the same request will fail again."""


class InvalidRequest(CallerError):
    """A field has a value that no job can have. `field` is its name in the protocol, `limits.memory` for instance."""

    def __init__(self, field: str, reason: str, verb: str = "start job") -> None:
        super().__init__(f"cannot {verb}: {field}: {reason}")
        self.field = field
        self.reason = reason


class JobNotFound(CallerError):
    """No job has this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f'cannot find job "{job_id}": no such job')
        self.job_id = job_id


class JobRemoved(CallerError):
    """The request id has started a job already, whose record has been removed since."""

    def __init__(self, request_id: str, job_id: str) -> None:
        super().__init__(f'cannot start job: request_id: "{request_id}" has started job {job_id}, which was removed')
        self.request_id = request_id
        self.job_id = job_id


class RequestConflict(CallerError):
    """The request id was used before, by the same user, for a different request."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f'cannot start job: request_id: "{request_id}" was used for another request')
        self.request_id = request_id


class OffsetOutOfRange(CallerError):
    """An offset past the end of the log of a job that has ended."""

    def __init__(self, job_id: str, offset: int, end: int) -> None:
        super().__init__(f"cannot read log of job {job_id}: offset {offset} is past its end, {end}")
        self.job_id = job_id
        self.offset = offset
        self.end = end


class AccessError(JobRunnerError):
    """The peer may not do this, whatever it asks for."""


class Unauthenticated(AccessError):
    """Who is calling could not be established: no certificate, or one that the server does not accept."""


class PermissionDenied(AccessError):
    """The caller is known, and the role does not allow the call."""


class StartFailed(JobRunnerError):
    """The job could not be started, and so is none. `step` names what failed (`exec`, `cwd`, `cgroup`, `mount` ...).

    `errno` is the kernel's error number (errno(3)), or 0 where no system call failed; `detail` is what the step was at.
    """

    def __init__(self, command: str, step: str, errno: int = 0, detail: str = "") -> None:
        reason = os.strerror(errno) if errno else ""
        parts = [step, *(part for part in (detail, reason) if part)]
        super().__init__(f'cannot start "{command}": {": ".join(parts)}')
        self.command = command
        self.step = step
        self.errno = errno
        self.detail = detail


class StopFailed(JobRunnerError):
    """The job's processes are not gone some seconds after the kill (uninterruptible sleep)."""

    def __init__(self, job_id: str, reason: str) -> None:
        super().__init__(f"cannot stop job {job_id}: {reason}")
        self.job_id = job_id


class LimitReached(JobRunnerError):
    """A bound of the server was met. `bound` names it as the configuration does.

    `retry_after` is not 0 where the call was not looked at, and may be made again after so many seconds.
    """

    def __init__(self, verb: str, bound: str, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(f"cannot {verb}: {reason} ({bound})")
        self.bound = bound
        self.reason = reason
        self.retry_after = retry_after


class HostError(JobRunnerError):
    """The host lacks what jobs need; the message ends with the remedy."""


class ConfigError(JobRunnerError):
    """A setting, or a file that it names, cannot be used. `what` is the file or variable; `reason` begins with the key, if any."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"cannot read {what}: {reason}")
        self.what = what
        self.reason = reason


class CertificateError(JobRunnerError):
    """A certificate, a key or a CA's directory on this side cannot be made, read or changed; `reason` ends with the remedy."""

    def __init__(self, verb: str, reason: str) -> None:
        super().__init__(f"cannot {verb}: {reason}")
        self.reason = reason


class Unavailable(JobRunnerError):
    """The server cannot be reached, or takes no new work; the same request may succeed later."""


class Timeout(JobRunnerError):
    """The caller's own deadline passed before the answer came."""


class Unsupported(JobRunnerError):
    """The other side does not know this call."""


class InternalError(JobRunnerError):
    """A bug in jobrunner, on this side or the other."""


class WouldBlock(JobRunnerError):
    """`next_line_nowait` found no whole line yet, and the job may still write one."""

    def __init__(self) -> None:
        super().__init__("cannot read line: none is there yet")
