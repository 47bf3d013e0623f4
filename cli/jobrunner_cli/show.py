"""What a job is, for people (tables, sentences) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from jobrunner.job import EndReason, JobInfo, Limits, Usage, Workspace
from jobrunner.stdio import STDERR
from jobrunner.units import format_duration, format_size

__all__ = ["NETWORK_HOST", "as_json", "clean", "command_line", "details", "ending", "hint", "moment", "table", "workspaces"]

NETWORK_HOST = "--network host gives it the host's, if the server allows it"
_MOMENTS = ("created", "started", "ended")
_SIZES = ("memory", "tmp_size", "work_size", "output_limit", "memory_peak", "read_bytes", "write_bytes")
_RATES = ("read_bps", "write_bps")
_DURATIONS = ("timeout", "idle_timeout", "cpu_user", "cpu_system", "throttled", "wall")


def ending(info: JobInfo) -> str:
    """`failed: exit code 3`, or just the status where there is nothing to add."""
    return f"{info.status}: {info.message}" if info.message else str(info.status)


def hint(info: JobInfo) -> str:
    """What a person who sees a command fail may not think of; empty where nobody is at a terminal, or nothing is to be said.

    Not where the job was ended by a signal or a bound: its message says why.
    """
    if info.end_reason != EndReason.EXITED or not info.exit_code or info.network != "none" or not os.isatty(STDERR):
        return ""
    return f"hint: the job had no network; {NETWORK_HOST}"


def as_json(value: JobInfo | Sequence[JobInfo]) -> str:
    """The fields of JobInfo: times in RFC 3339 (UTC), sizes in bytes, durations in seconds; null is not known, or not limited."""
    plain = _plain(value) if isinstance(value, JobInfo) else [_plain(info) for info in value]
    return json.dumps(plain, indent=2)


def table(jobs: Sequence[JobInfo], now: float | None = None) -> str:
    """One line for each job, under a heading. USER is who started it, and in brackets the user that it asked to be."""
    now = time.time() if now is None else now
    rows = [("ID", "STATUS", "NAME", "STARTED", "USER", "COMMAND")]
    for info in jobs:
        age = f"{_age(now - (info.started or info.created))} ago"
        user = clean(f"{info.user} ({info.runs_as})" if info.runs_as else info.user)
        rows.append((info.job_id, str(info.status), clean(info.name), age, user, command_line(info, 60)))
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]) for row in rows)


def workspaces(found: Sequence[Workspace], now: float | None = None) -> str:
    """One line for each, under a heading."""
    now = time.time() if now is None else now
    rows = [("NAME", "SIZE", "USED", "JOB", "USER")]
    for one in found:
        size = "" if one.size is None else format_size(one.size)
        rows.append((clean(one.name), size, f"{_age(now - one.used)} ago", one.held_by, clean(one.user)))
    return _columns(rows)


def details(info: JobInfo) -> str:
    """Everything known of a job, one `name: value` on a line; what is not known is left out."""
    lines = {
        "id": info.job_id,
        "name": clean(info.name),
        "status": str(info.status),
        "reason": str(info.end_reason or ""),
        "message": clean(info.message),
        "exit code": "" if info.exit_code is None else str(info.exit_code),
        "signal": "" if info.signal is None else str(info.signal),
        "command": command_line(info),
        "labels": " ".join(clean(f"{name}={value}") for name, value in sorted(info.labels.items())),
        "user": clean(info.user),
        "node": clean(info.node),
        **{name: moment(getattr(info, name)) for name in _MOMENTS if getattr(info, name)},
        "stopped by": clean(info.stopped_by),
        "network": clean(info.network),
        "root": clean(info.root),
        "writable": "yes" if info.writable else "",
        "runs as": clean(info.runs_as),
        "volumes": " ".join(map(clean, info.volumes)),
        "workspace": clean(info.workspace),
        "work": clean(info.work),
        "limits": _numbers(info.limits),
        "usage": _numbers(info.usage),
        "missing": "; ".join(map(clean, info.missing)),
        "output": f"{info.log_end} bytes" + (f", the first {info.log_start} dropped" if info.log_start else ""),
    }
    return "\n".join(f"{name + ':':<12}{text}" for name, text in lines.items() if text)


def _plain(info: JobInfo) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(info):
        value = getattr(info, field.name)
        if field.name in _MOMENTS:
            value = None if value is None else moment(value)
        elif isinstance(value, Limits | Usage):
            value = {inner.name: _word(getattr(value, inner.name)) for inner in dataclasses.fields(value)}
        elif isinstance(value, Mapping):
            value = dict(value)
        values[field.name] = _word(value)
    return values


def _word(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _numbers(values: Limits | Usage) -> str:
    texts = []
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if value is None:
            continue
        if field.name in _SIZES:
            value = format_size(value)
        elif field.name in _RATES:
            value = f"{format_size(value)}/s"
        elif field.name in _DURATIONS:
            value = format_duration(value)
        texts.append(f"{field.name}={value}")
    return " ".join(texts)


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _age(seconds: float) -> str:
    """One or two digits and a unit are enough to tell jobs apart."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def command_line(info: JobInfo, most: int = 0) -> str:
    text = clean(shlex.join((info.command, *info.args)))
    return f"{text[: most - 1]}…" if most and len(text) > most else text


def clean(text: str) -> str:
    """Without control characters: a job's name or arguments must not steer a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
