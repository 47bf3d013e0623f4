"""The library's values as messages, and back. One table for each pair of types; a field that is not in it does not travel.

Times are exact to the microsecond in both directions. Limits and requests that come in are checked as if they had been made
here: `spec_from_wire` and `limits_from_wire` raise InvalidRequest. What comes from a server may hold words that this version does
not know: they are kept where the value has room for them, and read as the nearest known thing otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from jobrunner.errors import InvalidRequest
from jobrunner.job import EndReason, Gap, JobInfo, JobSpec, JobStatus, Limits, OutputPolicy, Stream, Usage, Workspace
from jobrunner.output import Begin, Chunk, End, Selection
from jobrunner.wire import messages as pb

__all__ = [
    "datetime_from_seconds",
    "info_from_wire",
    "info_to_wire",
    "limits_from_wire",
    "limits_to_wire",
    "output_from_wire",
    "output_to_wire",
    "seconds_from_datetime",
    "seconds_from_duration",
    "selection_from_wire",
    "selection_to_wire",
    "spec_from_wire",
    "spec_to_wire",
    "timedelta_from_seconds",
    "usage_from_wire",
    "usage_to_wire",
    "workspace_from_wire",
    "workspace_to_wire",
]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def timedelta_from_seconds(seconds: float | None) -> timedelta | None:
    """Seconds, rounded to the microsecond, as the Duration field takes them."""
    return None if seconds is None else timedelta(microseconds=round(seconds * 1_000_000))


def seconds_from_duration(duration: timedelta | None) -> float | None:
    return None if duration is None else duration / MICROSECOND / 1_000_000


def datetime_from_seconds(seconds: float | None) -> datetime | None:
    """Seconds since the epoch, rounded to the microsecond, as the Timestamp field takes them."""
    return None if seconds is None else EPOCH + timedelta(microseconds=round(seconds * 1_000_000))


def seconds_from_datetime(moment: datetime | None) -> float | None:
    return None if moment is None else (moment - EPOCH) / MICROSECOND / 1_000_000


def readable(text: str) -> str:
    """A text of the kernel's (PEP 383) as Unicode that can travel; what is no UTF-8 becomes U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Field:
    """How one field of a value travels under the same name in its message."""

    to_wire: Callable[[Any], Any]
    from_wire: Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


def _policy_from_wire(word: str) -> OutputPolicy | None:
    return OutputPolicy(word) if word in list(OutputPolicy) else None


def _reason_from_wire(word: str) -> EndReason | str | None:
    return EndReason(word) if word in list(EndReason) else word or None


def _volume_to_wire(text: str) -> pb.Volume:
    return pb.Volume(name=text.removesuffix(":ro"), read_only=text.endswith(":ro"))


def _volume_from_wire(volume: pb.Volume) -> str:
    if not volume.name or ":" in volume.name:
        raise InvalidRequest("volumes", f"{volume.name!r} is no name of a volume")
    return f"{volume.name}:ro" if volume.read_only else volume.name


SAME = Field(_same, _same)
WORD = Field(lambda value: value or "", _same)
TEXT = Field(readable, _same)
TEXTS = Field(lambda value: [readable(text) for text in value], tuple)
TEXT_MAP = Field(lambda value: {readable(key): readable(text) for key, text in value.items()}, dict)
DURATION = Field(timedelta_from_seconds, seconds_from_duration)
MOMENT = Field(datetime_from_seconds, seconds_from_datetime)

VOLUMES = Field(lambda volumes: [_volume_to_wire(text) for text in volumes], lambda volumes: tuple(map(_volume_from_wire, volumes)))

LIMITS: Mapping[str, Field] = {
    "cpus": SAME,
    "memory": SAME,
    "pids": SAME,
    "read_bps": SAME,
    "write_bps": SAME,
    "read_iops": SAME,
    "write_iops": SAME,
    "open_files": SAME,
    "tmp_size": SAME,
    "work_size": SAME,
    "timeout": DURATION,
    "idle_timeout": DURATION,
    "output_limit": SAME,
    "output_policy": Field(lambda policy: policy or "", _policy_from_wire),
}

USAGE: Mapping[str, Field] = {
    "cpu_user": DURATION,
    "cpu_system": DURATION,
    "memory": SAME,
    "memory_peak": SAME,
    "pids": SAME,
    "pids_peak": SAME,
    "read_bytes": SAME,
    "write_bytes": SAME,
    "read_ops": SAME,
    "write_ops": SAME,
    "throttled": DURATION,
    "oom_kills": SAME,
    "wall": DURATION,
}


def limits_to_wire(limits: Limits) -> pb.Limits:
    return pb.Limits(**_out(LIMITS, limits))


def limits_from_wire(message: pb.Limits | None) -> Limits:
    """Raises InvalidRequest for a limit that no job can have; an output policy of a newer version reads as not set."""
    return Limits(**_in(LIMITS, message)) if message else Limits()


def usage_to_wire(usage: Usage) -> pb.Usage:
    return pb.Usage(**_out(USAGE, usage))


def usage_from_wire(message: pb.Usage | None) -> Usage:
    return Usage(**_in(USAGE, message)) if message else Usage()


SPEC: Mapping[str, Field] = {
    "command": SAME,
    "args": Field(list, tuple),
    "name": SAME,
    "env": Field(dict, dict),
    "cwd": SAME,
    "limits": Field(lambda limits: None if limits == Limits() else limits_to_wire(limits), limits_from_wire),
    "labels": Field(dict, dict),
    "request_id": SAME,
    "merge": SAME,
    "stop_signal": Field(_same, lambda name: name or "TERM"),
    "grace": DURATION,
    "root": SAME,
    "writable": SAME,
    "network": SAME,
    "user": SAME,
    "volumes": VOLUMES,
    "workspace": SAME,
    "stdin": SAME,
}

INFO: Mapping[str, Field] = {
    "job_id": SAME,
    "status": WORD,
    "end_reason": Field(lambda reason: reason or "", _reason_from_wire),
    "exit_code": SAME,
    "signal": SAME,
    "name": TEXT,
    "command": TEXT,
    "args": TEXTS,
    "labels": TEXT_MAP,
    "user": TEXT,
    "node": TEXT,
    "created": Field(datetime_from_seconds, lambda moment: seconds_from_datetime(moment) or 0.0),
    "started": MOMENT,
    "ended": MOMENT,
    "limits": Field(limits_to_wire, limits_from_wire),
    "missing": TEXTS,
    "usage": Field(usage_to_wire, usage_from_wire),
    "stopped_by": TEXT,
    "message": TEXT,
    "network": TEXT,
    "root": TEXT,
    "writable": SAME,
    "volumes": VOLUMES,
    "workspace": TEXT,
    "work": TEXT,
    "runs_as": TEXT,
}


def spec_to_wire(spec: JobSpec) -> pb.JobStartRequest:
    """Raises InvalidRequest for a text that is not Unicode: the protocol's strings are UTF-8."""
    message = pb.JobStartRequest(**_out(SPEC, spec))
    try:
        bytes(message)
    except UnicodeEncodeError as exc:
        raise InvalidRequest(_not_unicode(spec), "is not Unicode, and the protocol carries nothing else") from exc
    return message


def spec_from_wire(message: pb.JobStartRequest) -> JobSpec:
    """Raises InvalidRequest that names the field."""
    limits = message.limits
    if limits and limits.output_policy not in ("", *OutputPolicy):
        raise InvalidRequest("limits.output_policy", f"{limits.output_policy!r} is not one of {', '.join(OutputPolicy)}")
    return JobSpec(**_in(SPEC, message))


def info_to_wire(info: JobInfo) -> pb.JobInfo:
    log = pb.LogInfo(first_offset=info.log_start, end_offset=info.log_end)
    return pb.JobInfo(**_out(INFO, info), log=log)


def info_from_wire(message: pb.JobInfo) -> JobInfo:
    """A status of a newer version reads as running or failed, by whether the job has ended; other new words are kept."""
    values = _in(INFO, message)
    if values["status"] not in list(JobStatus):
        values["status"] = JobStatus.RUNNING if message.ended is None else JobStatus.FAILED
    log = message.log or pb.LogInfo()
    return JobInfo(**values | {"status": JobStatus(values["status"])}, log_start=log.first_offset, log_end=log.end_offset)


WORKSPACE: Mapping[str, Field] = {
    "user": TEXT,
    "name": TEXT,
    "used": Field(datetime_from_seconds, lambda moment: seconds_from_datetime(moment) or 0.0),
    "size": SAME,
    "held_by": TEXT,
}


def workspace_to_wire(workspace: Workspace) -> pb.Workspace:
    return pb.Workspace(**_out(WORKSPACE, workspace))


def workspace_from_wire(message: pb.Workspace) -> Workspace:
    return Workspace(**_in(WORKSPACE, message))


STREAMS: Mapping[Stream, pb.OutputStream] = {
    Stream.STDOUT: pb.OutputStream.STDOUT,
    Stream.STDERR: pb.OutputStream.STDERR,
}


def _streams_to_wire(streams: frozenset[Stream]) -> list[pb.OutputStream]:
    """Empty for both."""
    return [STREAMS[stream] for stream in Stream if stream in streams] if len(streams) < len(Stream) else []


def _streams_from_wire(values: list[pb.OutputStream]) -> frozenset[Stream]:
    names = {value: stream for stream, value in STREAMS.items()}
    for value in values:
        if value not in names:
            raise InvalidRequest("streams", f"{int(value)} is no output stream", verb="read log")
    return frozenset(names[value] for value in values)


SELECTION: Mapping[str, Field] = {
    "offset": SAME,
    "follow": Field(_same, lambda follow: follow is not False),
    "streams": Field(_streams_to_wire, _streams_from_wire),
    "tail": SAME,
    "since": MOMENT,
    "until": MOMENT,
    "exact_times": SAME,
}


def selection_to_wire(job_id: str, selection: Selection) -> pb.JobSubscriptionRequest:
    return pb.JobSubscriptionRequest(job_id=job_id, **_out(SELECTION, selection))


def selection_from_wire(message: pb.JobSubscriptionRequest) -> Selection:
    """Raises InvalidRequest that names the field."""
    return Selection(**_in(SELECTION, message))


def output_to_wire(part: Chunk | Gap | End | Begin) -> pb.JobOutputResponse:
    match part:
        case Chunk(stream=Stream.STDOUT):
            return pb.JobOutputResponse(stdout=part.data, offset=part.offset, time=datetime_from_seconds(part.time))
        case Chunk():
            return pb.JobOutputResponse(stderr=part.data, offset=part.offset, time=datetime_from_seconds(part.time))
        case Gap():
            gap = pb.Gap(first=part.first, last=part.last, reason=part.reason)
            return pb.JobOutputResponse(offset=part.first, gap=gap)
        case End():
            info = info_to_wire(part.info) if part.info else None
            return pb.JobOutputResponse(offset=part.total_bytes, end=pb.End(total_bytes=part.total_bytes, info=info))
        case Begin():
            begin = pb.Begin(offset=part.offset, stdout=part.stdout, stderr=part.stderr)
            return pb.JobOutputResponse(offset=part.offset, begin=begin)


def output_from_wire(message: pb.JobOutputResponse) -> Chunk | Gap | End | Begin | None:
    """None for a message of a kind that this version does not know; it carries no output."""
    if message.end is not None:
        return End(message.end.total_bytes, info_from_wire(message.end.info) if message.end.info else None)
    if message.gap is not None:
        return Gap(message.gap.first, message.gap.last, message.gap.reason)
    if message.begin is not None:
        return Begin(message.begin.offset, message.begin.stdout, message.begin.stderr)
    moment = seconds_from_datetime(message.time) or 0.0
    if message.stdout:
        return Chunk(Stream.STDOUT, message.stdout, message.offset, moment)
    if message.stderr:
        return Chunk(Stream.STDERR, message.stderr, message.offset, moment)
    return None


def _out(table: Mapping[str, Field], value: object) -> dict[str, Any]:
    return {name: field.to_wire(getattr(value, name)) for name, field in table.items()}


def _in(table: Mapping[str, Field], message: object) -> dict[str, Any]:
    return {name: field.from_wire(getattr(message, name)) for name, field in table.items()}


def _not_unicode(spec: JobSpec) -> str:
    """Which field of this request holds the text that is not Unicode."""
    texts = {name: str(getattr(spec, name)) for name in SPEC if isinstance(getattr(spec, name), str)}
    texts |= {f"args[{index}]": arg for index, arg in enumerate(spec.args)}
    texts |= {f"env[{readable(name)}]": name + value for name, value in spec.env.items()}
    texts |= {f"labels[{readable(name)}]": name + value for name, value in spec.labels.items()}
    return next((name for name, text in texts.items() if text != readable(text)), "volumes")
