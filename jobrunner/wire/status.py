"""Errors as gRPC statuses and back, by one table.

A plain gRPC client sees the status and the message. For ours a trailer, `jobrunner-error-bin`, names the class and its fields as
JSON, so that the SDK raises what the library would have raised. Without the trailer (another server, a proxy, grpclib itself) the
class follows from the status.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from grpclib.const import Status

from jobrunner import errors

__all__ = ["ERROR_TRAILER", "STATUS_OF", "WireError", "error_from_wire", "error_to_wire"]

ERROR_TRAILER = "jobrunner-error-bin"
MAX_MESSAGE = 1024
"""Characters of a message on the wire, four times as many as of a field: peers bound their headers, grpc at 8 KiB with escapes."""


class Row(NamedTuple):
    """The status of an error, and the fields that travel with it."""

    status: Status
    fields: tuple[str, ...] = ()


STATUS_OF: Mapping[type[errors.JobRunnerError], Row] = {
    errors.InvalidRequest: Row(Status.INVALID_ARGUMENT, ("field", "reason")),
    errors.JobNotFound: Row(Status.NOT_FOUND, ("job_id",)),
    errors.JobRemoved: Row(Status.NOT_FOUND, ("request_id", "job_id")),
    errors.RequestConflict: Row(Status.ALREADY_EXISTS, ("request_id",)),
    errors.OffsetOutOfRange: Row(Status.OUT_OF_RANGE, ("job_id", "offset", "end")),
    errors.Unauthenticated: Row(Status.UNAUTHENTICATED),
    errors.PermissionDenied: Row(Status.PERMISSION_DENIED),
    errors.StartFailed: Row(Status.FAILED_PRECONDITION, ("command", "step", "errno", "detail")),
    errors.StopFailed: Row(Status.FAILED_PRECONDITION, ("job_id",)),
    errors.HostError: Row(Status.FAILED_PRECONDITION),
    errors.LimitReached: Row(Status.RESOURCE_EXHAUSTED, ("bound", "retry_after")),
    errors.Unavailable: Row(Status.UNAVAILABLE),
    errors.Timeout: Row(Status.DEADLINE_EXCEEDED),
    errors.Unsupported: Row(Status.UNIMPLEMENTED),
    errors.InternalError: Row(Status.INTERNAL),
}

CLASSES: Mapping[str, type[errors.JobRunnerError]] = {cls.__name__: cls for cls in STATUS_OF}
DEFAULTS: Mapping[str, Any] = {"offset": 0, "end": 0, "errno": 0, "retry_after": 0.0}
"""Of fields that are numbers; all others are texts, "" if they did not come."""

CLASS_OF: Mapping[Status, type[errors.JobRunnerError]] = {
    # Reversed, so that the first row of a status wins.
    **{row.status: cls for cls, row in reversed(list(STATUS_OF.items()))},
    Status.CANCELLED: errors.Unavailable,
    Status.ABORTED: errors.Unavailable,
}
"""The class of a status that came without the trailer; InternalError for any that is not here."""


class WireError(NamedTuple):
    """An error as it goes out: status, message and trailing metadata."""

    status: Status
    message: str
    trailer: dict[str, bytes]


def error_to_wire(error: errors.JobRunnerError) -> WireError:
    """The status, message and trailer of an error. A class without a row, its own or a base's, is INTERNAL."""
    cls = next((base for base in type(error).__mro__ if base in STATUS_OF), errors.InternalError)
    row = STATUS_OF[cls]
    details = {name: _shortened(getattr(error, name, ""), MAX_MESSAGE // 4) for name in row.fields}
    trailer = json.dumps({"class": cls.__name__, **details}).encode()
    return WireError(row.status, _shortened(error.message, MAX_MESSAGE), {ERROR_TRAILER: trailer})


def error_from_wire(status: Status, message: str | None, trailer: Mapping[str, Any] | None = None) -> errors.JobRunnerError:
    """The error that the other side raised; the message is passed through as it came."""
    details = _parsed((trailer or {}).get(ERROR_TRAILER))
    cls = CLASSES.get(str(details.get("class")))
    if cls is None or STATUS_OF[cls].status is not status:
        cls = CLASS_OF.get(status, errors.InternalError)
    # Not through __init__: it would compose the message again, from fields that may have been shortened.
    error = cls.__new__(cls)
    errors.JobRunnerError.__init__(error, message or status.name)
    for name in STATUS_OF[cls].fields:
        default = DEFAULTS.get(name, "")
        value = details.get(name, default)
        setattr(error, name, value if isinstance(value, type(default)) else default)
    return error


def _parsed(raw: object) -> dict[str, Any]:
    try:
        details = json.loads(raw) if isinstance(raw, bytes) else {}
    except ValueError:
        return {}
    return details if isinstance(details, dict) else {}


def _shortened(value: Any, most: int) -> Any:
    """Texts as Unicode without lone surrogates and at most this long; the end gives way, and says so."""
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else f"{text[: most - 1]}…"
