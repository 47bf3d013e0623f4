"""Who asks for metrics: plain HTTP on a listener of its own, which shares nothing with gRPC's.

A connection has one request, which is answered as soon as its head is there. So places are held by those alone who ask slowly or do
not read the answer. There are few for each address, and where they are taken the one that has been idle for longest gives way. Far
fewer are accepted in a turn of the loop than there are places, so that who speaks is heard before it has to give way.

`Host` has to name this server: a browser that was led here by a name of somebody else's (DNS rebinding) says that name. Who says an
address has not been led here by a name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from ipaddress import ip_address

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from jobrunner.config import ServerConfig
from jobrunner.server.account import Account
from jobrunner.server.limits import Bucket
from jobrunner.server.listening import address_of, bound_address, listen, stop_accepting
from jobrunner.units import parse_address

__all__ = ["exposed"]

logger = logging.getLogger(__name__)

ACCEPTS = 4
PER_ADDRESS, MAX_CONNECTIONS = 32, 128
MAX_REQUEST = 8192
"""Bytes."""
SECONDS = 5.0
"""That a connection lasts: a request, its answer, and until that has been read."""
FRESH, FRESH_BURST = 10.0, 2.0
"""Answers in a second that are written anew, and seconds' worth of them that may be at once: each takes a millisecond or two."""


@asynccontextmanager
async def exposed(config: ServerConfig, collector: Collector, account: Account) -> AsyncIterator[str]:
    """Answer on `metrics_listen`, and give the address that it is, "" for none. Raises HostError if it cannot listen."""
    address = config.metrics_listen
    if address is None:
        yield ""
        return
    names = {"localhost", parse_address(address)[0].lower(), *map(str.lower, config.metrics_hosts)}
    scrapes = Scrapes(collector, names, account)
    server = await listen(lambda: Scrape(scrapes), address, ACCEPTS)
    bound = bound_address(server, address)
    logger.info("metrics on http://%s/metrics", bound)
    try:
        yield bound
    finally:
        await stop_accepting(server)
        scrapes.close()


class Scrapes:
    """The connections of those who ask, and what they are answered."""

    def __init__(self, collector: Collector, names: Collection[str], account: Account) -> None:
        """`names` are what `Host` may say, in small letters, besides addresses."""
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        self._names = names
        self._account = account
        self._fresh = Bucket(FRESH, burst=FRESH_BURST)
        self._last = b""
        self._open: dict[Scrape, None] = {}
        """In the order in which they came."""

    def __repr__(self) -> str:
        return f"<Scrapes {len(self._open)} connections>"

    def enter(self, scrape: Scrape) -> None:
        """One more, in the place of another if there is none."""
        own = [one for one in self._open if one.host == scrape.host]
        crowd = own if len(own) >= PER_ADDRESS else [*self._open] if len(self._open) >= MAX_CONNECTIONS else []
        if crowd:
            next((one for one in crowd if one.idle), crowd[0]).leave()
        self._open[scrape] = None

    def left(self, scrape: Scrape) -> None:
        self._open.pop(scrape, None)

    def close(self) -> None:
        for scrape in [*self._open]:
            scrape.leave()

    def answer(self, head: bytes, address: str) -> bytes:
        """To a request's line and headers."""
        line, *headers = head.split(b"\r\n")
        method, _, rest = line.partition(b" ")
        target, _, version = rest.partition(b" ")
        path = target.partition(b"?")[0]
        status, kind, body = "200 OK", "text/plain", b""
        hosts = _values(headers, b"host")
        if len(hosts) > 1 or (not hosts and version != b"HTTP/1.0"):  # RFC 9112 section 3.2
            status, body = "400 Bad Request", b"cannot tell metrics: there is not exactly one Host\n"
        elif hosts and not self._is_known(hosts[0]):
            reason = f"metrics: Host is {hosts[0]!r}, which metrics_hosts does not name"
            self._account.no_call({"address": address}, path.decode("latin-1"), reason)
            status, body = "421 Misdirected Request", b"cannot tell metrics: Host is none of metrics_hosts\n"
        elif method not in (b"GET", b"HEAD"):
            status = "405 Method Not Allowed"
        elif path != b"/metrics":
            status, body = "404 Not Found", b"/metrics\n"
        else:
            kind, body = CONTENT_TYPE_PLAIN_0_0_4, self._metrics()
        lines = (f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close", "", "")
        return "\r\n".join(lines).encode() + (b"" if method == b"HEAD" else body)

    def _metrics(self) -> bytes:
        """As they are now, or were a moment ago where many ask."""
        if not self._fresh.take() or not self._last:
            self._last = generate_latest(self._registry)
        return self._last

    def _is_known(self, host: str) -> bool:
        """Of a Host header: NAME, or an address, both with a port or without."""
        try:
            name = parse_address(host if host.rpartition("]")[2].count(":") else f"{host}:80")[0].lower()
        except ValueError:
            return False
        try:
            return bool(ip_address(name))
        except ValueError:
            return name.removesuffix(".") in self._names


class Scrape(asyncio.Protocol):
    """One connection."""

    def __init__(self, scrapes: Scrapes) -> None:
        self._scrapes = scrapes
        self._head = b""
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._address = address_of(transport.get_extra_info("peername"))
        self.host = self._address.rpartition(":")[0]
        self._timer = asyncio.get_running_loop().call_later(SECONDS, transport.abort)
        self._scrapes.enter(self)

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way to it."""
        return not self._transport.get_write_buffer_size()

    def leave(self) -> None:
        self._scrapes.left(self)
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._answered:  # what is not read when the connection is closed would take the answer back
            return
        self._head += data
        if len(self._head) > MAX_REQUEST:
            self.leave()
            return
        head, end, _ = self._head.partition(b"\r\n\r\n")
        if end or not self._head[:1].isalpha():  # no HTTP at all, TLS for instance, is told so at once
            self._answered = True
            self._transport.write(self._scrapes.answer(head, self._address))
            self._transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._scrapes.left(self)


def _values(headers: list[bytes], wanted: bytes) -> list[str]:
    parts = [header.partition(b":") for header in headers]
    return [value.strip().decode("latin-1") for name, _, value in parts if name.lower() == wanted]
