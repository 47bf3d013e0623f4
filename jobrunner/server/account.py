"""What becomes of those who connect and call, told in one place: to the server's log, the audit log and the metrics alike.

    handshake  one that failed              denied   a call that its caller may not make, or that is none, before its answer
    refused    by a bound                   allowed  a call, before anything of it is done
    cut        the end of a connection      done     that call, before its answer, or at the end of an answer that is a stream

`allowed` and `done` have the number of the call. While the audit log cannot be written, calls that change something (those that
only admins may make) are refused; what only looks goes on.

A flood of handshakes, refusals, cuts and requests that are no calls is not a flood of lines: past some of one peer, and some of
all, they are counted, and one line tells how many were (`times`). Calls and their denials are always told: their rate is bounded.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from grpclib.const import Status
from grpclib.events import RecvMessage, SendMessage, SendTrailingMetadata, listen
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

from jobrunner.errors import Unavailable
from jobrunner.server.audit import MAX_TEXT, Audit
from jobrunner.server.limits import Bucket, Rate
from jobrunner.server.metrics import Metrics

__all__ = ["Account", "AuditedCall", "attach", "audited"]

logger = logging.getLogger(__name__)

LINES_PER_PEER, LINES = 1.0, 50.0
"""In a second, of one user or address, and of all; BURST seconds' worth at once (`limits`)."""
SUM_UP = 10.0
"""Seconds after which those that were not told one by one are told."""

_call: ContextVar[AuditedCall | None] = ContextVar("call", default=None)


@dataclass(slots=True)
class AuditedCall:
    """One call, from its admission to its end."""

    account: Account
    who: dict[str, str]
    rpc: str
    number: int
    unary: bool
    begun: float = field(default_factory=time.monotonic)
    job: str = ""
    bound: str = ""
    """Which it has met, if it has met one."""
    cancelled: bool = False
    done: bool = False

    def end(self, outcome: str) -> None:
        """Only the first end counts. Never raises: the call has been made."""
        if not self.done:
            self.done = True
            self.account.done(self, outcome)


class Account:
    """Of one server."""

    def __init__(self, audit: Audit, metrics: Metrics) -> None:
        self.audit = audit
        self.metrics = metrics
        self._numbers = itertools.count(1)
        self._peers = Rate("", LINES_PER_PEER, "lines")
        self._all = Bucket(LINES)
        self._untold: Counter[str] = Counter()

    def handshake_failed(self, address: str, reason: str) -> None:
        """`address` is HOST:PORT."""
        self.metrics.handshake_failed(reason)
        self._tell("handshake", {"address": address}, f"TLS handshake with {address} failed: {reason}", reason=reason)

    def refused(self, who: dict[str, str], bound: str, reason: str, rpc: str = "") -> None:
        """A bound that is not a call's own error, which `done` tells."""
        self.metrics.refused(bound)
        self._tell("refused", who, f"refused {_peer(who)}: {reason} ({bound})", rpc=rpc, bound=bound, reason=reason)

    def met(self, bound: str) -> None:
        """A bound whose call, which is the current one, is told with its outcome."""
        self.metrics.refused(bound)
        if (call := _call.get()) is not None:
            call.bound = bound

    def ended(self, who: dict[str, str], reason: str, cause: str) -> None:
        """A connection is, by the server. `cause` is a bound's name, or another word of few."""
        self.metrics.connection_ended(cause)
        self._tell("cut", who, f"ending the connection of {_peer(who)}: {reason}", reason=reason)

    def denied(self, who: dict[str, str], rpc: str, status: Status, reason: str) -> None:
        self.metrics.call(rpc, status.name)
        self.audit.write("denied", **who, rpc=rpc, reason=reason)

    def no_call(self, who: dict[str, str], path: str, reason: str) -> None:
        """A request that is malformed, no request of gRPC, or of an RPC that there is not."""
        self.metrics.no_calls += 1
        path, reason = path[:MAX_TEXT], reason[:MAX_TEXT]
        self._tell("denied", who, f"denied {path!r} to {_peer(who)}: {reason}", rpc=path, reason=reason)

    def begin(self, who: dict[str, str], rpc: str, *, changes: bool, unary: bool) -> AuditedCall:
        """A call that is let through, before anything of it is done. Unavailable if it changes something and cannot be written."""
        call = AuditedCall(self, who, rpc, next(self._numbers), unary)
        if not self.audit.write("allowed", **who, call=call.number, rpc=rpc) and changes:
            name = rpc.rpartition("/")[2]
            raise Unavailable(f"cannot call {name}: the audit log cannot be written")
        _call.set(call)
        return call

    def done(self, call: AuditedCall, outcome: str) -> None:
        self.metrics.call(call.rpc, outcome)
        seconds = round(time.monotonic() - call.begun, 6)
        what: dict[str, Any] = {"call": call.number, "rpc": call.rpc, "job": call.job, "bound": call.bound}
        self.audit.write("done", **call.who, **what, outcome=outcome, seconds=seconds)

    def sum_up(self) -> None:
        """Tell of how many there was no line."""
        for event, times in self._untold.items():
            text = f"{times} more of these in the last {SUM_UP:g} s"
            logger.warning("%s: %s", event, text)
            self.audit.write(event, reason=text, times=times)
        self._untold.clear()

    def close(self) -> None:
        """Tell what is left to be told; nothing is written from here on."""
        self.sum_up()
        self.audit.close()

    def _tell(self, event: str, who: dict[str, str], text: str, **what: str) -> None:
        peer = who.get("user") or who["address"].rpartition(":")[0]
        if self._peers.of(f"{event} {peer}").take() or self._all.take():
            if not self._untold:
                asyncio.get_running_loop().call_later(SUM_UP, self.sum_up)
            self._untold[event] += 1
            return
        logger.warning("%s", text)
        self.audit.write(event, **who, **what)


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
            # grpclib's UNKNOWN: the client has reset the call, or a bug (`stream` sends another word).
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


def _peer(who: dict[str, str]) -> str:
    return f"{who['user']!r} at {who['address']}" if who.get("user") else who["address"]


def _job(message: object) -> str:
    return str(getattr(message, "job_id", ""))[:64]
