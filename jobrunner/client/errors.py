"""The one place where what grpclib, ssl and the operating system raise becomes an error of `jobrunner.errors`."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from h2.exceptions import H2Error

from jobrunner.errors import (
    InternalError,
    InvalidRequest,
    JobRunnerError,
    LimitReached,
    Timeout,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from jobrunner.wire.status import ERROR_TRAILER, error_from_wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from grpclib.client import Stream as Call

    from jobrunner.client.channel import ClientChannel

__all__ = ["Attempt", "Interrupted", "translated"]

_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it requires one",
    "TLSV1_ALERT_UNKNOWN_CA": "it is not signed by the server's CA",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it has expired, or the server's revocation list has: its log says which",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it is revoked",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it is not for use by a client (extended key usage clientAuth)",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it is not valid, or not yet: look at its dates and at both clocks",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it is not acceptable",
    "TLSV1_ALERT_DECRYPT_ERROR": "its signature is wrong",
    "TLSV1_ALERT_ACCESS_DENIED": "access denied",
}
"""Alerts that a server sends about a client's certificate (RFC 8446 section 6.2), by OpenSSL's names as `ssl.SSLError.reason`."""

_UNKNOWN_CA = frozenset({18, 19, 20, 21})
"""OpenSSL's numbers for a chain that does not end at a CA that was given (X509_V_ERR_*, x509_vfy.h)."""
_BOUND = re.compile(r"cannot (?P<verb>[^:]*): (?P<reason>.*) \((?P<bound>[a-z_]+)\)", re.DOTALL)
"""What a server says when it ends a connection for a bound: `cannot VERB: reason (bound)`."""


_NO_TLS_1_3 = {
    "TLSV1_ALERT_PROTOCOL_VERSION": "the server does not speak TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "the server does not speak TLS 1.3",
    "WRONG_VERSION_NUMBER": "the server does not speak TLS",
}


CLOSED = "the server closes connections during TLS: it has too many, or rejects the client certificate without saying so"


class Interrupted(Unavailable):
    """The server has closed a first connection before it said anything: it has too many handshakes, or is about to leave."""


class Attempt:
    """One call while it is made: what failed in words, its deadline in seconds, and the grpclib call once there is one."""

    def __init__(self, verb: str, timeout: float | None) -> None:
        self.verb = verb
        self.timeout = timeout
        self.call: Call[Any, Any] | None = None


@asynccontextmanager
async def translated(channel: ClientChannel, verb: str, timeout: float | None = None) -> AsyncIterator[Attempt]:
    """Raise what one call raises as an error of this project. `verb` is what failed: `start job`, `read log of job X`.

    The whole call must be made inside, by one task, and put into the `call` of what this yields.
    """
    attempt = Attempt(verb, timeout)
    before = _cancelling()
    try:
        yield attempt
    except GRPCError as exc:
        raise _told(channel, attempt, exc) from exc
    except TimeoutError as exc:
        _uncancel(before)
        raise _timed_out(channel, attempt) from exc
    except StreamTerminatedError as exc:
        _uncancel(before)
        raise await _lost(channel, exc) from exc
    except (OSError, H2Error, ProtocolError) as exc:
        raise await _lost(channel, exc) from exc
    except UnicodeEncodeError as exc:
        raise InvalidRequest("request", f"{exc.object[:64]!r} is no text that can be sent", verb) from exc
    except (AssertionError, AttributeError, NotImplementedError, ValueError, OverflowError) as exc:
        # A message that is none (`wire.codec`), or grpclib's own words for a peer that does not keep to the protocol.
        raise InternalError(f"cannot {verb}: unexpected answer from {_address(channel)}: {exc!r}") from exc


def _cancelling() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def _uncancel(before: int) -> None:
    """grpclib wakes a call by cancelling its task and turns that into an error, but leaves the task's count of requests raised.

    A request of somebody else that came at the same moment stays, and is honoured.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling() > before and task.uncancel() > before:
        raise asyncio.CancelledError


def _address(channel: ClientChannel) -> str:
    return str(channel._authority)


def _told(channel: ClientChannel, attempt: Attempt, exc: GRPCError) -> JobRunnerError:
    """What the server said. Without its trailer it was not the service that spoke, and the text says too little by itself."""
    trailer = attempt.call.trailing_metadata if attempt.call is not None else None
    status = _bare_status(attempt) or exc.status
    error = error_from_wire(status, exc.message, trailer)
    if trailer and ERROR_TRAILER in trailer:
        return error
    if status is Status.UNIMPLEMENTED:
        return Unsupported(f"cannot {attempt.verb}: the server at {_address(channel)} is too old")
    if not error.message.startswith("cannot "):
        return type(error)(f"cannot {attempt.verb}: {error.message}") if _takes_text(error) else error
    return error


def _bare_status(attempt: Attempt) -> Status | None:
    """The status of an answer without a content type, which grpclib's servers give to a call that they do not know.

    grpclib's client looks at the content type first, and says UNKNOWN.
    """
    stream = getattr(attempt.call, "_stream", None)
    headers = dict(getattr(stream, "headers", None) or ())
    text = headers.get("grpc-status", "") if "content-type" not in headers else ""
    return next((status for status in Status if str(status.value) == text), None)


def _takes_text(error: JobRunnerError) -> bool:
    return type(error).__init__ is JobRunnerError.__init__


def _timed_out(channel: ClientChannel, attempt: Attempt) -> JobRunnerError:
    if attempt.call is None or attempt.call.peer is None:
        return Unavailable(f"cannot reach {_address(channel)}: no answer to the attempt to connect")
    within = f" within {attempt.timeout:g} s" if attempt.timeout is not None else ""
    return Timeout(f"cannot {attempt.verb}: no answer from {_address(channel)}{within}")


async def _lost(channel: ClientChannel, exc: Exception) -> JobRunnerError:
    """Why a connection could not be made, or why it was lost."""
    where = f"cannot reach {_address(channel)}"
    if isinstance(exc, ssl.SSLCertVerificationError):
        why = f"it is not signed by the CA given ({exc.verify_message})" if exc.verify_code in _UNKNOWN_CA else exc.verify_message
        return Unauthenticated(f"{where}: the server's certificate is not acceptable: {why}")
    if isinstance(exc, ssl.SSLEOFError | ConnectionResetError | ConnectionAbortedError | BrokenPipeError) and not channel.reached:
        return Interrupted(f"{where}: {CLOSED}")
    if isinstance(exc, ssl.SSLError):
        return _refused(where, exc) or Unavailable(f"{where}: TLS failed: {_reason(exc)}")
    if isinstance(exc, OSError):
        return Unavailable(f"{where}: {_reason(exc)}")
    last = channel.last
    if last is not None and last.told is not None and (bound := _BOUND.fullmatch(last.told[1])):
        return LimitReached(bound["verb"], bound["bound"], f"{_address(channel)}: {bound['reason']}")
    if last is None or last.received or not last.gone:
        told = last.lost if last is not None else None
        return Unavailable(f"lost the connection to {_address(channel)}: {_reason(told or exc)}")
    try:
        if isinstance(last.lost, ssl.SSLError):
            raise last.lost
        said = await channel.probe()
    except ssl.SSLEOFError:
        said = b""
    except ssl.SSLError as alert:
        return _refused(where, alert) or Unauthenticated(f"{where}: the server refused TLS: {_reason(alert)}")
    except OSError as probed:
        if channel.reached or not isinstance(probed, ConnectionResetError | ConnectionAbortedError | BrokenPipeError):
            return Unavailable(f"{where}: {_reason(probed)}")
        said = b""
    if channel.reached:  # who was accepted before and is refused now would be told an alert
        return Unavailable(f"lost the connection to {_address(channel)}: {_reason(last.lost or exc)}")
    return Interrupted(f"{where}: it closed the first connection and took the next" if said else f"{where}: {CLOSED}")


def _refused(where: str, exc: ssl.SSLError) -> Unauthenticated | None:
    """The alert that tells that the server rejects the client's certificate, if this is one."""
    why = _ALERTS.get(exc.reason or "")
    return Unauthenticated(f"{where}: the server rejected the client certificate: {why}") if why else None


def _reason(exc: BaseException) -> str:
    """The operating system's words for an error, without Python's decoration."""
    if isinstance(exc, ssl.SSLError):
        return _NO_TLS_1_3.get(exc.reason or "") or (exc.reason or str(exc)).replace("_", " ").lower()
    if isinstance(exc, socket.gaierror):
        return exc.strerror or str(exc)
    if isinstance(exc, OSError):
        return os.strerror(exc.errno) if exc.errno else str(exc) or "connection lost"
    return str(exc)[:1].lower() + str(exc)[1:]
