"""What is told to Prometheus: the server as it is, and what `metrics` has counted. `scrapes` says to whom."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jobrunner import __version__

if TYPE_CHECKING:
    from jobrunner.runner import JobRunner
    from jobrunner.server.app import JobServer
    from jobrunner.server.metrics import Histogram
    from jobrunner.server.trust import Trust

__all__ = ["ServerCollector"]


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
        yield CounterMetricFamily("jobrunner_no_calls", "Requests that were none of an RPC.", counted.no_calls)
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
