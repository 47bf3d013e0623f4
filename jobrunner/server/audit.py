"""The audit log: who was let in, who was not, who called what, and how it ended. JSON, one object to a line.

    time, event (denied, allowed, done, handshake, cut), address, user, serial, role, call, rpc, job, reason, outcome, seconds

A denial is one line, before its answer. A call that is let through is two: `allowed` before anything of it is done, `done` before
its answer, or the end of its answer where that is a stream; both have the number of the call. A `handshake` is one that failed, a
`cut` the end of a connection whose client is not trusted any more. What a line does not know it leaves out.

Written with one write(2), not synced: it outlives the server's death, not the host's. When it cannot be written, calls that change
something (those that only admins may make) are refused until it can be again; what only looks goes on, and the log says so.
Nothing of a request is in it but the job's id: no command, no variable, no output.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpclib.const import Status
from grpclib.events import RecvMessage, SendMessage, SendTrailingMetadata, listen
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

from jobrunner.errors import ConfigError, Unavailable

__all__ = ["Audit", "AuditedCall", "attach", "audited"]

logger = logging.getLogger(__name__)

_call: ContextVar[AuditedCall | None] = ContextVar("call", default=None)


@dataclass(slots=True)
class AuditedCall:
    """One call, from its admission to its end."""

    audit: Audit
    who: dict[str, str]
    rpc: str
    number: int
    unary: bool
    begun: float = field(default_factory=time.monotonic)
    job: str = ""
    cancelled: bool = False
    done: bool = False

    def end(self, outcome: str) -> None:
        """Only the first end counts. Never raises: the call has been made."""
        if self.done:
            return
        self.done = True
        seconds = round(time.monotonic() - self.begun, 6)
        self.audit.write("done", **self.who, call=self.number, rpc=self.rpc, job=self.job, outcome=outcome, seconds=seconds)


class Audit:
    """The log at one path; without a path nothing is written."""

    def __init__(self, path: Path | None) -> None:
        """ConfigError if it cannot be opened."""
        self._path = path
        self._fd = -1
        self._numbers = itertools.count(1)
        self._failing = False
        if path is not None:
            try:
                self._fd = self._open(path)
            except OSError as exc:
                raise ConfigError(f"audit log {path}", exc.strerror or str(exc)) from exc

    def __repr__(self) -> str:
        return f"<Audit {self._path} {'failing' if self._failing else 'fine'}>"

    def reopen(self) -> None:
        """After it was renamed. The old file stays open if there can be no new one."""
        if self._path is None:
            return
        try:
            fd = self._open(self._path)
        except OSError as exc:
            logger.error("cannot open audit log %s: %s; the file from before stays in use", self._path, exc.strerror)
            return
        os.close(self._fd)
        self._fd = fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def denied(self, who: dict[str, str], rpc: str, reason: str) -> None:
        self.write("denied", **who, rpc=rpc, reason=reason)

    def begin(self, who: dict[str, str], rpc: str, *, changes: bool, unary: bool) -> AuditedCall:
        """A call that is let through, before anything of it is done. Unavailable if it changes something and cannot be written."""
        call = AuditedCall(self, who, rpc, next(self._numbers), unary)
        if not self.write("allowed", **who, call=call.number, rpc=rpc) and changes:
            name = rpc.rpartition("/")[2]
            raise Unavailable(f"cannot call {name}: the audit log cannot be written")
        _call.set(call)
        return call

    def write(self, event: str, **fields: str | float) -> bool:
        """Whether it is written; also where there is no log to write. Fields that are empty are left out."""
        if self._fd < 0:
            return True
        known = {name: value for name, value in fields.items() if value != ""}
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="microseconds"), "event": event, **known}) + "\n"
        data = line.encode()
        try:
            written = os.write(self._fd, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as exc:
            if not self._failing:
                logger.error("cannot write audit log %s: %s; calls that change something are refused", self._path, exc.strerror)
            self._failing = True
            return False
        if self._failing:
            logger.warning("the audit log %s can be written again", self._path)
        self._failing = False
        return True

    @staticmethod
    def _open(path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def attach(server: Server) -> None:
    """Let every call of this server tell its job and its end. Handlers run in the call's own task, and so do these."""

    async def received(event: RecvMessage) -> None:
        if (call := _call.get()) is not None:
            call.job = call.job or _job(event.message)

    async def sending(event: SendMessage) -> None:
        if (call := _call.get()) is not None and call.unary:
            call.job = call.job or _job(event.message)
            call.end("OK")

    async def ending(event: SendTrailingMetadata) -> None:
        if (call := _call.get()) is not None:
            # grpclib's UNKNOWN: the client has reset the call, or a bug (`http2` sends another word).
            gone = "CANCELLED" if call.cancelled else "INTERNAL"
            call.end(gone if event.status is Status.UNKNOWN else event.status.name)

    listen(server, RecvMessage, received)
    listen(server, SendMessage, sending)
    listen(server, SendTrailingMetadata, ending)


def audited(handler: Callable[[Stream[Any, Any]], Coroutine[Any, Any, None]], call: AuditedCall) -> Callable[..., Any]:
    """The handler of a call whose end is told also when there is nobody left to answer."""

    async def answer(stream: Stream[Any, Any]) -> None:
        try:
            await handler(stream)
        except GRPCError as exc:
            call.end(exc.status.name)
            raise
        except asyncio.CancelledError:
            # Order: who cancelled it may still answer, with a status, before this task yields.
            call.cancelled = True
            asyncio.get_running_loop().call_soon(call.end, "CANCELLED")
            raise
        call.end("OK")

    return answer


def _job(message: object) -> str:
    return str(getattr(message, "job_id", ""))[:64]
