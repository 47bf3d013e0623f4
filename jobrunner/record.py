"""A job's directory: what is durable about it before it runs, and how it is made, read and removed (docs/formats.md).

Everything here may wait for the disk, so the runner calls it in a thread. Nothing here knows processes or cgroups.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobrunner.errors import HostError, JobRunnerError
from jobrunner.job import JobSpec, Limits, OutputPolicy, is_job_id
from jobrunner.shim.stopfile import StopRequest, pack_stop, parse_stop

VERSION = 1


class RecordError(JobRunnerError):
    """A file of the state directory cannot be read as what it should be."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What job.json holds: the request as applied. `spec.env` has the names of the variables only, with empty values."""

    job_id: str
    spec: JobSpec
    limits: Limits
    user: str
    node: str
    created: float
    fingerprint: str
    """Of the request as it came, environment values included: tells whether a request id is used for another request."""
    cgroup: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def fingerprint(spec: JobSpec) -> str:
    """A digest of everything that was asked for, but the request id itself."""
    return hashlib.sha256(json.dumps(_spec_json(replace(spec, request_id="")), sort_keys=True).encode()).hexdigest()


class StateDir:
    """The state directory, held by one server at a time."""

    def __init__(self, path: Path) -> None:
        """Make and lock it. HostError if it cannot be made or another server holds it."""
        self.path = path
        self.jobs = path / "jobs"
        self.running = path / "running"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.jobs.mkdir(mode=0o700, exist_ok=True)
            self.running.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise HostError(f"cannot use state directory {path}: {exc.strerror}") from exc
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._lock)
            raise HostError(f"cannot use state directory {path}: another server holds it") from exc

    def close(self) -> None:
        os.close(self._lock)

    def directory(self, job_id: str) -> Path:
        return self.jobs / job_id

    def job_ids(self) -> list[str]:
        return [name for name in os.listdir(self.jobs) if is_job_id(name)]

    def running_ids(self) -> set[str]:
        return {name for name in os.listdir(self.running) if is_job_id(name)}

    def create(self, record: JobRecord) -> None:
        """Make the job's directory and marker, durably: after this a crash leaves a start that recovery finds."""
        directory = self.directory(record.job_id)
        directory.mkdir(mode=0o700)
        (directory / "log").mkdir(mode=0o700)
        # Order: the marker comes first, on disk too, so that no directory with a job.json is ever taken for a settled job's.
        (self.running / record.job_id).touch(mode=0o600)
        _sync_directory(self.running)
        write_durably(directory / "job.json", json.dumps(_to_json(record)).encode())
        _sync_directory(self.jobs)

    def load(self, job_id: str) -> JobRecord:
        """Read job.json. FileNotFoundError if there is none; RecordError if it is not what this version understands."""
        path = self.directory(job_id) / "job.json"
        try:
            raw = json.loads(path.read_bytes())
            if raw["version"] != VERSION:
                raise RecordError(f"cannot read {path}: its version is {raw['version']}, this server knows {VERSION}")
            record = _from_json(raw)
            if record.job_id != job_id:
                raise RecordError(f"cannot read {path}: it is of job {record.job_id}")
            return record
        except FileNotFoundError:
            raise
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, JobRunnerError) as exc:
            raise exc if isinstance(exc, RecordError) else RecordError(f"cannot read {path}: {exc!r}") from exc

    def settle(self, job_id: str) -> None:
        """The job has ended and everything about it is on disk: it is no longer looked at first after a restart."""
        (self.running / job_id).unlink(missing_ok=True)

    def remove(self, job_id: str) -> None:
        """Remove all of a job. What is there after a crash half-way has no job.json and is removed by recovery."""
        directory = self.directory(job_id)
        with contextlib.suppress(FileNotFoundError):
            (directory / "job.json").unlink()
        shutil.rmtree(directory, ignore_errors=True)
        self.settle(job_id)

    def write_stop(self, job_id: str, request: StopRequest) -> None:
        """Make a stop durable. A later one only shortens the first one's grace period."""
        before = self.read_stop(job_id)
        if before is not None:
            request = replace(before, grace=min(before.grace, request.grace))
        write_durably(self.directory(job_id) / "stop", pack_stop(request))

    def claim(self, job_id: str) -> bool:
        """Make `ctl`, so that a shim that has not made it yet never starts the job. False if a shim was first."""
        try:
            os.mkfifo(self.directory(job_id) / "ctl", 0o600)
        except FileExistsError:
            return False
        return True

    def read_stop(self, job_id: str) -> StopRequest | None:
        """The stop that was asked for, None if there was none."""
        try:
            return parse_stop((self.directory(job_id) / "stop").read_bytes())
        except (OSError, ValueError):
            return None


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is there whole or not at all: temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _spec_json(spec: JobSpec) -> dict[str, Any]:
    plain = {name: getattr(spec, name) for name in JobSpec.__dataclass_fields__}
    return plain | {"limits": asdict(spec.limits), "env": dict(spec.env), "labels": dict(spec.labels)}


def _to_json(record: JobRecord) -> dict[str, Any]:
    return {
        "version": VERSION,
        "job_id": record.job_id,
        "spec": _spec_json(record.spec) | {"env": sorted(record.spec.env)},
        "limits": asdict(record.limits),
        "user": record.user,
        "node": record.node,
        "created": record.created,
        "fingerprint": record.fingerprint,
        "cgroup": dict(record.cgroup),
        "missing": list(record.missing),
    }


def _from_json(raw: dict[str, Any]) -> JobRecord:
    spec = raw["spec"]
    return JobRecord(
        job_id=raw["job_id"],
        spec=JobSpec(**spec | {"env": dict.fromkeys(spec["env"], ""), "limits": _limits(spec["limits"])}),
        limits=_limits(raw["limits"]),
        user=raw["user"],
        node=raw["node"],
        created=float(raw["created"]),
        fingerprint=raw["fingerprint"],
        cgroup=raw["cgroup"],
        missing=tuple(raw["missing"]),
    )


def _limits(raw: dict[str, Any]) -> Limits:
    policy = raw.get("output_policy")
    return Limits(**raw | {"output_policy": OutputPolicy(policy) if policy else None})
