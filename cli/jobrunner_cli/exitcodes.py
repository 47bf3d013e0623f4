"""The exit code of every way in which `jobrunner` can fail, in one table.

0 is success and 2 a command line that cannot be understood. The others follow sysexits.h(3head) where it has a word for them,
and the shell's for commands that cannot be executed. `run` and `wait` pass the job's own code on, whatever it is; a failure of
jobrunner itself is told apart by its line on standard error, which begins with `jobrunner: `.
"""

from __future__ import annotations

import errno
from types import MappingProxyType
from typing import TYPE_CHECKING

from jobrunner import errors
from jobrunner.job import JobInfo, JobStatus
from jobrunner.stdio import OutputFailed

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CODES", "ENDED_WITHOUT_CODE", "INTERRUPTED", "USAGE", "exit_code", "job_exit_code"]

USAGE = 2
INTERRUPTED = 130
"""128 + SIGINT, as a shell says it."""
NOT_EXECUTABLE = 126
NOT_FOUND = 127
ENDED_WITHOUT_CODE = 125
"""A job that did not complete, and has neither a signal nor a code other than 0: `lost`, or stopped and then exited with 0."""


CODES: Mapping[type[errors.JobRunnerError], int] = MappingProxyType(
    {
        errors.InvalidRequest: 65,  # EX_DATAERR: a value that no job can have
        errors.JobNotFound: 66,  # EX_NOINPUT
        errors.Unauthenticated: 67,  # EX_NOUSER: a certificate was refused, by either side
        errors.RequestConflict: 68,
        errors.Unavailable: 69,  # EX_UNAVAILABLE: the server is away
        errors.InternalError: 70,  # EX_SOFTWARE
        errors.HostError: 71,  # EX_OSERR: the server's host lacks what jobs need
        errors.StopFailed: 72,
        errors.StartFailed: 73,  # EX_CANTCREAT; 126 and 127 for a command that cannot be executed or is not there, as a shell's
        OutputFailed: 74,  # EX_IOERR
        errors.LimitReached: 75,  # EX_TEMPFAIL
        errors.Unsupported: 76,  # EX_PROTOCOL: the server is too old
        errors.PermissionDenied: 77,  # EX_NOPERM: the role does not allow it
        errors.ConfigError: 78,  # EX_CONFIG: an address or certificate is missing or cannot be read
        errors.OffsetOutOfRange: 79,
        errors.Timeout: 80,
        errors.CertificateError: 81,  # of `jobrunner certs`
        errors.JobRemoved: 82,  # started before under this request id, and removed since
        errors.JobRunnerError: 70,  # any other
    }
)


def exit_code(error: errors.JobRunnerError) -> int:
    """The code of an error: its own, or that of the nearest class above it."""
    if isinstance(error, errors.StartFailed) and error.step == "exec":
        return NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE
    return next(CODES[cls] for cls in type(error).__mro__ if cls in CODES)


def job_exit_code(info: JobInfo) -> int:
    """The exit code that stands for how a job ended: its own, 128 + n for signal n, never 0 unless it completed."""
    if info.status is JobStatus.COMPLETED:
        return 0
    if info.signal is not None:
        return 128 + info.signal
    return info.exit_code or ENDED_WITHOUT_CODE
