"""JobServer: grpclib's server, listening with bounds, every call authorized and guarded, and a shutdown that clients understand.

    connection ─ tcp.Listener (how many, TLS, who) ─ http2.ServerProtocol (how much) ─► call
    call       ─ auth.authorize ─ draining? ─ guard.guarded ─► handler of service, health, reflection

Shutdown, in this order: new calls are UNAVAILABLE and health says NOT_SERVING; calls that only wait or stream end with UNAVAILABLE;
the others get DRAIN_TIMEOUT seconds; connections are told GOAWAY and closed; what is left after SHUTDOWN_TIMEOUT is dropped.
A GOAWAY before the calls have ended would not do: grpclib's clients drop the connection when they see one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, cast

import anyio
from grpclib import events
from grpclib.const import Status
from grpclib.events import RecvRequest
from grpclib.server import Server

from jobrunner.config import ServerConfig
from jobrunner.errors import AccessError, LimitReached, Unauthenticated, Unavailable
from jobrunner.server import auth
from jobrunner.server.account import Account, attach, audited
from jobrunner.server.auth import Role
from jobrunner.server.calls import CallHandler
from jobrunner.server.guard import grpc_error, guarded, refused
from jobrunner.server.http2 import CONFIGURATION, ServerProtocol
from jobrunner.server.limits import Rate
from jobrunner.server.listening import address_of, bound_address, listen, stop_accepting
from jobrunner.server.shared import ServerPeer, Shared
from jobrunner.server.stream import ServerStream
from jobrunner.server.tcp import ACCEPTS, Listener, TlsConnection
from jobrunner.server.trust import Trust
from jobrunner.wire.codec import StrictCodec

__all__ = ["JobServer"]

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT = 5.0
SHUTDOWN_TIMEOUT = 2.0
DISMISS_TIMEOUT = 0.5
"""Seconds that the calls of a client which is not trusted any more have to be told so."""
ENDLESS = frozenset({"SubscribeOutput", "Wait", "ServerReflectionInfo"})
"""Calls that only wait or stream: nothing is cut in half when they end at once. Health's Watch ends by itself."""
HEALTH = "/grpc.health."
FRAMES_BURST = 3.0
"""Seconds' worth of small frames that may come at once; of calls it is more, but a flood is handled to the end of what was read."""


class JobServer(Server):
    """Serves these handlers on one address. `serve` is the whole of its life."""

    def __init__(
        self, handlers: Collection[Any], config: ServerConfig, trust: Trust, account: Account, draining: anyio.Event
    ) -> None:
        """`draining` is set by `shutdown`, and read by whoever tells the state of the server.

        Raises AssertionError if the handlers' RPCs are not those of the policy.
        """
        super().__init__(handlers, codec=StrictCodec(config.bounds.max_fields), config=CONFIGURATION)
        self._h2_config.header_encoding = None  # `frames` looks at them first, and makes texts of them
        auth.check_complete(self._mapping)
        self.draining = draining
        self._policy = auth.policy(config.viewer_output)
        self._settings = config
        bounds = config.bounds
        frames = Rate("max_frames_per_second", bounds.max_frames_per_second, "small frames", burst=FRAMES_BURST)
        self._shared = Shared(bounds, frames, account)
        self._call_rate = Rate("max_calls_per_second", bounds.max_calls_per_second, "calls")
        self._start_rate = Rate("max_starts_per_second", bounds.max_starts_per_second, "starts")
        self._connections = self._shared.live
        self._changed = self._shared.changed
        self._trust = trust
        self.account = account
        self.listener = Listener(trust.context, trust.admit, account, self._protocol_factory, bounds, SHUTDOWN_TIMEOUT)
        events.listen(self, RecvRequest, self._admit)
        attach(self)

    def __repr__(self) -> str:
        state = "draining" if self.draining.is_set() else "serving"
        return f"<JobServer {state} {self.connections} connections {self.calls} calls>"

    @property
    def connections(self) -> int:
        """How many there are whose client has been authenticated."""
        return len(self._connections)

    @property
    def calls(self) -> int:
        """How many are being handled."""
        return len(self._calls())

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Listen, and give the address as HOST:PORT; shut down on leaving. Raises HostError if it cannot listen."""
        server = await listen(self.listener.accept, self._settings.listen, ACCEPTS)
        try:
            yield bound_address(server, self._settings.listen)
        finally:
            with anyio.CancelScope(shield=True):
                await stop_accepting(server)
                await self.shutdown()

    async def keep_trust(self) -> None:
        """Until cancelled: read the certificate files again when they change, and end the connections that are not trusted now."""
        await self._trust.keep(self._dismiss)

    def _dismiss(self) -> None:
        """Order: its calls are told why, which takes a moment, then the connection is closed."""
        self.listener.context = self._trust.context
        now = datetime.now(UTC)
        loop = asyncio.get_running_loop()
        for connection in self._connections:
            tls: TlsConnection = connection.transport.get_extra_info("connection")
            reason = self._trust.judge(tls.client, now)
            if not reason or tls.dismissed:
                continue
            tls.dismissed, tls.refusal = True, reason
            self.account.ended(connection.who(), reason, "untrusted")
            for stream in connection.streams():
                call = stream.method.rpartition("/")[2]
                stream.end_call(Status.UNAUTHENTICATED, f"cannot call {call}: {reason}")
            loop.call_later(DISMISS_TIMEOUT, connection.go_away)
            loop.call_later(2 * DISMISS_TIMEOUT, tls.abort)

    async def finish_calls(self) -> None:
        """Give calls that are about to end, as those that follow jobs which have just ended, SHUTDOWN_TIMEOUT seconds to do so."""
        await self._wait_until(lambda: not self._calls(), SHUTDOWN_TIMEOUT)

    async def shutdown(self) -> None:
        """End every call and connection; see the module. Cancelling it drops what is left at once."""
        self.draining.set()
        try:
            for stream in self._calls():
                if stream.method.rpartition("/")[2] in ENDLESS:
                    self._end(stream)
            await self._wait_until(lambda: not self._calls(), DRAIN_TIMEOUT)
            for stream in self._calls():
                self._end(stream)
            await self._wait_until(lambda: not self._calls(), SHUTDOWN_TIMEOUT)
            for connection in list(self._connections):
                connection.go_away()
            await self._wait_until(lambda: not self._connections, SHUTDOWN_TIMEOUT)
        finally:
            await self.listener.close()

    def _protocol_factory(self) -> ServerProtocol:
        handler = CallHandler(self._mapping, self._codec, self._status_details_codec, self.__dispatch__)
        return ServerProtocol(handler, self._h2_config, self._shared)

    async def _admit(self, event: RecvRequest) -> None:
        """Before anything of a call is looked at: may this peer make it?"""
        address = address_of(event.peer.addr())
        who = auth.who(event.peer.cert(), address)
        try:
            self._charge(cast("ServerPeer", event.peer).protocol, event.method_name)
            refusal = event.peer._transport.get_extra_info("connection").refusal
            if refusal:
                raise Unauthenticated(f"cannot call {event.method_name.rpartition('/')[2]}: {refusal}")
            auth.authorize(event.method_name, event.peer.cert(), self._policy, address)
            if self.draining.is_set() and not event.method_name.startswith(HEALTH):
                call = event.method_name.rpartition("/")[2]
                raise Unavailable(f"cannot call {call}: the server is shutting down")
            changes = Role.VIEWER not in self._policy[event.method_name]
            unary = not self._mapping[event.method_name].cardinality.server_streaming
            admitted = self.account.begin(who, event.method_name, changes=changes, unary=unary)
        except LimitReached as exc:
            self.account.refused(who, exc.bound, exc.message.removesuffix(f" ({exc.bound})"), event.method_name)
            event.method_func = refused(exc)
            return
        except (AccessError, Unavailable) as exc:
            answer = grpc_error(exc)
            self.account.denied(who, event.method_name, answer.status, exc.message)
            raise answer from exc
        event.method_func = audited(guarded(event.method_func, event.method_name, self.account.met), admitted)

    def _charge(self, connection: ServerProtocol, method: str) -> None:
        """Count the call of this user. Raises LimitReached. Before authorization: denials cost as much, and are logged."""
        call = method.rpartition("/")[2]
        for rate in (self._call_rate, self._start_rate) if call == "Start" else (self._call_rate,):
            try:
                rate.charge(connection.user, f"call {call}")
            except LimitReached as exc:
                if rate.of(connection.user).overdrawn:
                    # Order: after this call has been told.
                    asyncio.get_running_loop().call_soon(connection.end, exc.message, exc.bound)
                raise

    def _calls(self) -> list[ServerStream]:
        return [stream for connection in self._connections for stream in connection.streams()]

    def _end(self, stream: ServerStream) -> None:
        call = stream.method.rpartition("/")[2]
        stream.end_call(Status.UNAVAILABLE, f"cannot call {call}: the server is shutting down")

    async def _wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Until this holds of the calls and connections, but not longer than this."""
        with anyio.move_on_after(seconds):
            while not condition():
                self._changed.clear()
                await self._changed.wait()
