"""What job.json holds of a job (docs/formats.md): the request as applied, to JSON and back. No I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from jobrunner.errors import JobRunnerError
from jobrunner.job import JobSpec, Limits, OutputPolicy

__all__ = ["JobRecord", "RecordError", "fingerprint", "pack_record", "parse_record"]

VERSION = 1
PLAIN = {"str": str, "bool": bool, "int": int}
"""Types of fields that JSON has as they are."""
MAX_TIME = 253402300800.0
"""Seconds since the epoch of the year 10000, which no calendar of Python's has (datetime)."""


class RecordError(JobRunnerError):
    """A file of the state directory is not what it should be."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """The request as applied. `spec.env` has the names of the variables only, with empty values."""

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
    uid: int = 0
    """The job's; 0 in what a server wrote that ran jobs as root."""
    gid: int = 0
    work: str = "disk"
    """Where its /work is: `disk` or `memory`."""


def fingerprint(spec: JobSpec) -> str:
    """A digest of everything that was asked for, but the request id itself.

    Of what is not at its default alone, so that a server that knows more fields gives the same.
    """
    plain = _spec_json(spec)
    limits = {name: value for name, value in plain.pop("limits").items() if value is not None}
    asked = {name: value for name, value in plain.items() if name not in ("command", "request_id") and value != USUAL[name]}
    return hashlib.sha256(json.dumps([spec.command, asked, limits], sort_keys=True).encode()).hexdigest()


def pack_record(record: JobRecord) -> bytes:
    """job.json."""
    raw = {
        "version": VERSION,
        "job_id": record.job_id,
        "spec": _spec_json(record.spec) | {"env": sorted(record.spec.env)},
        "limits": _limits_json(record.limits),
        "user": record.user,
        "node": record.node,
        "created": record.created,
        "fingerprint": record.fingerprint,
        "cgroup": dict(record.cgroup),
        "missing": list(record.missing),
        "uid": record.uid,
        "gid": record.gid,
        "work": record.work,
    }
    return json.dumps(raw).encode()


def parse_record(data: bytes, job_id: str) -> JobRecord:
    """The record of this job. RecordError, which says why, for anything that is not one of this version."""
    try:
        raw = json.loads(data)
        if raw["version"] != VERSION:
            raise RecordError(f"its version is {raw['version']}, this server knows {VERSION}")
        record = _from_json(raw)
    except RecordError:
        raise
    except (ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError, JobRunnerError) as exc:
        raise RecordError(f"it is damaged: {exc!r}") from exc
    if not 0 <= record.created < MAX_TIME:
        raise RecordError(f"it was created at {record.created}, which is no time")
    if record.job_id != job_id:
        raise RecordError(f"it is of job {record.job_id}")
    for part in (record, record.spec):
        for item in fields(part):
            kind = PLAIN.get(str(item.type))
            if kind is not None and not isinstance(getattr(part, item.name), kind):
                raise RecordError(f"it is damaged: {item.name} is no {item.type}")
    return record


def _spec_json(spec: JobSpec) -> dict[str, Any]:
    plain = {item.name: getattr(spec, item.name) for item in fields(JobSpec)}
    return plain | {"limits": _limits_json(spec.limits), "env": dict(spec.env), "labels": dict(spec.labels)}


def _limits_json(limits: Limits) -> dict[str, Any]:
    return {item.name: getattr(limits, item.name) for item in fields(Limits)}


USUAL = _spec_json(JobSpec("usual"))
"""What a request has that asks for nothing."""


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
        cgroup={str(name): str(path) for name, path in raw["cgroup"].items()},
        missing=tuple(map(str, raw["missing"])),
        uid=int(raw.get("uid", 0)),
        gid=int(raw.get("gid", raw.get("uid", 0))),
        work=raw.get("work") or ("memory" if raw["limits"].get("work_size") else "disk"),
    )


def _limits(raw: dict[str, Any]) -> Limits:
    policy = raw.get("output_policy")
    return Limits(**raw | {"output_policy": OutputPolicy(policy) if policy else None})
