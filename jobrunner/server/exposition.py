"""Prometheus metrics: one small answer in plain HTTP, on a listener of their own that shares nothing with gRPC's.

A connection has one request, a few seconds, and a place among few: the newest takes that of the oldest. So whoever asks slowly, or
reads slowly, holds up nobody and is forgotten.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jobrunner import __version__
from jobrunner.errors import HostError
from jobrunner.server.tcp import stop_accepting
from jobrunner.units import parse_address

if TYPE_CHECKING:
    from jobrunner.runner import JobRunner
    from jobrunner.server.app import JobServer
    from jobrunner.server.metrics import Histogram
    from jobrunner.server.trust import Trust

__all__ = ["ServerCollector", "exposed"]

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 8
MAX_REQUEST = 8192
"""Bytes."""
SECONDS = 5.0
"""From the first byte of a request to the last of its answer."""


class ServerCollector(Collector):
    """The server as it is now, and what it has counted."""

    def __init__(self, server: JobServer, runner: JobRunner, trust: Trust) -> None:
        self._server = server
        self._runner = runner
        self._trust = trust

    def collect(self) -> Iterable[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._of_jobs()

    def _gauges(self) -> Iterable[Metric]:
        server, audit = self._server, self._server.account.audit
        yield _labelled(GaugeMetricFamily, "jobrunner_build_info", "Always 1.", "version", {__version__: 1})
        yield GaugeMetricFamily("jobrunner_connections", "Connections whose client has been authenticated.", server.connections)
        yield GaugeMetricFamily("jobrunner_handshakes_pending", "Connections in their handshake.", len(server.listener.pending))
        yield GaugeMetricFamily("jobrunner_calls_in_progress", "Calls that are being handled.", server.calls)
        yield GaugeMetricFamily("jobrunner_draining", "1 while no new calls are taken.", server.draining.is_set())
        yield GaugeMetricFamily("jobrunner_audit_failing", "1 while the audit log cannot be written.", audit.failing)
        ends = {what: end.timestamp() for what, end in self._trust.ends().items()}
        text = "When the first of these ends, seconds since the epoch: the server's certificate, the CAs, their revocation lists."
        yield _labelled(GaugeMetricFamily, "jobrunner_certificate_expiry_timestamp_seconds", text, "file", ends)

    def _counters(self) -> Iterable[Metric]:
        counted = self._server.account.metrics
        calls = CounterMetricFamily("jobrunner_calls", "Calls that are over.", labels=("rpc", "status"))
        for (rpc, status), count in counted.calls.items():
            calls.add_metric((rpc, status), count)
        yield calls
        for name, text, label, counts in (
            ("jobrunner_refusals", "What a bound has refused.", "bound", counted.refusals),
            ("jobrunner_handshake_failures", "Handshakes that have failed.", "reason", counted.handshake_failures),
            ("jobrunner_connections_ended", "Connections that the server has ended.", "cause", counted.connections_ended),
        ):
            yield _labelled(CounterMetricFamily, name, text, label, counts)
        yield CounterMetricFamily("jobrunner_output_sent_bytes", "Output of jobs sent to followers.", counted.bytes_sent)
        yield CounterMetricFamily("jobrunner_output_gaps", "Gaps in output that followers were told of.", counted.gaps_sent)
        yield _histogram("jobrunner_start_seconds", "How long starts of jobs took that succeeded.", counted.starts)

    def _of_jobs(self) -> Iterable[Metric]:
        runner = self._runner
        statuses = {str(status): count for status, count in runner.catalog.jobs.by_status.items()}
        yield _labelled(GaugeMetricFamily, "jobrunner_jobs", "Jobs that run or are kept.", "status", statuses)
        yield CounterMetricFamily("jobrunner_jobs_started", "Jobs that were started.", runner.started)
        ended = CounterMetricFamily("jobrunner_jobs_ended", "Jobs that have ended.", labels=("status", "end_reason"))
        for (status, reason), count in runner.endings.items():
            ended.add_metric((str(status), str(reason)), count)
        yield ended


def _labelled(kind: Callable[..., Any], name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    metric = kind(name, text, labels=(label,))
    for value, number in values.items():
        metric.add_metric((value,), number)
    return cast("Metric", metric)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, itertools.accumulate(histogram.counts), strict=True))
    metric = HistogramMetricFamily(name, text, labels=())
    metric.add_metric((), buckets, histogram.sum)
    return metric


@asynccontextmanager
async def exposed(listen: str | None, collector: Collector) -> AsyncIterator[str]:
    """Answer on this address, HOST:PORT, and give the one that it is; nothing for None. Raises HostError if it cannot listen."""
    if listen is None:
        yield ""
        return
    host, port = parse_address(listen)
    try:
        listener = Listener(collector)
        server = await asyncio.start_server(listener.answer, host, port, limit=MAX_REQUEST, backlog=2 * MAX_CONNECTIONS)
    except OSError as exc:
        raise HostError(f"cannot listen on {listen} for metrics: {exc.strerror or exc}") from exc
    port = server.sockets[0].getsockname()[1]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    logger.info("metrics on http://%s/metrics", address)
    try:
        yield address
    finally:
        await stop_accepting(server)
        listener.close()


class Listener:
    """The connections of those who ask."""

    def __init__(self, collector: Collector) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        """In the order in which they came."""

    def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            # Order: it gives its place up now, for several may come before it is done.
            oldest, its_writer = next(iter(self._open.items()))
            del self._open[oldest]
            its_writer.transport.abort()
            oldest.cancel()
        task = asyncio.get_running_loop().create_task(self._answer(reader, writer))
        self._open[task] = writer
        task.add_done_callback(self._done)

    def close(self) -> None:
        for task in self._open:
            task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        writer = self._open.pop(task, None)
        if writer is not None:  # held until then: from Python 3.13 on nobody else does, and one that is dropped open warns
            writer.transport.abort()
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.error("cannot tell metrics", exc_info=exc)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # so that `drain` waits until the kernel has all of it
        with suppress(TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._response(head))
                await writer.drain()
                writer.write_eof()
                while await reader.read(MAX_REQUEST):  # to abort with something unread would take the answer back
                    pass

    def _response(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        status, kind, body = "200 OK", CONTENT_TYPE_PLAIN_0_0_4, b""
        if method not in (b"GET", b"HEAD"):
            status, kind = "405 Method Not Allowed", "text/plain"
        elif path != b"/metrics":
            status, kind, body = "404 Not Found", "text/plain", b"/metrics\n"
        else:
            body = generate_latest(self._registry)
        lines = (f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close", "", "")
        return "\r\n".join(lines).encode() + (b"" if method == b"HEAD" else body)
