"""jobrunner: run Linux commands as isolated, limited jobs, on this host or on another over mutual TLS.

This package itself holds plain values only, so that it can be imported everywhere. The rooms below it:
`jobrunner.runner` (the library: jobs on this host), `jobrunner.client` (the SDK: jobs on a server), `jobrunner.server`.
"""

from jobrunner.errors import JobNotFound, JobRunnerError, StartFailed, WouldBlock
from jobrunner.job import EndReason, Gap, JobInfo, JobSpec, JobStatus, Limits, OutputPolicy, Stream, Usage

__all__ = [
    "EndReason",
    "Gap",
    "JobInfo",
    "JobNotFound",
    "JobRunnerError",
    "JobSpec",
    "JobStatus",
    "Limits",
    "OutputPolicy",
    "StartFailed",
    "Stream",
    "Usage",
    "WouldBlock",
    "__version__",
]

__version__ = "0.1.0"
