"""What the server counts, from its start on: plain numbers, which `exposition` shows to Prometheus.

Few series: a label is an RPC, a status, a bound or a kind of failure, never a job or a user.
"""

from __future__ import annotations

import bisect
from collections import Counter

__all__ = ["Histogram", "Metrics", "kind_of_failure"]

START_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

FAILURES = {
    "peer did not return a certificate": "no_certificate",
    "unable to get local issuer certificate": "unknown_ca",
    "self-signed certificate": "unknown_ca",
    "self-signed certificate in certificate chain": "unknown_ca",
    "unable to verify the first certificate": "unknown_ca",
    "certificate signature failure": "unknown_ca",
    "certificate has expired": "expired",
    "certificate is not yet valid": "not_yet_valid",
    "certificate revoked": "revoked",
    "CRL has expired": "crl_expired",
    "unable to get certificate CRL": "crl_missing",
    "unsuitable certificate purpose": "purpose",
    "unsupported protocol": "version",
    "wrong version number": "not_tls",
    "http request": "not_tls",
    "record layer failure": "not_tls",
}
"""OpenSSL's words (X509_verify_cert_error_string(3)), and the kind that they are counted as."""


def kind_of_failure(reason: str) -> str:
    """One of few words for why a handshake failed."""
    if reason.startswith("not done within"):
        return "timeout"
    if reason.startswith("the client closed"):
        return "closed"
    return FAILURES.get(reason, "other")


class Histogram:
    """How many took at most so long, in seconds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        """By RPC and status."""
        self.no_calls = 0
        """Requests that were malformed, none of gRPC's, or of no RPC."""
        self.refusals: Counter[str] = Counter()
        """By bound."""
        self.handshake_failures: Counter[str] = Counter(dict.fromkeys([*FAILURES.values(), "timeout", "closed", "other"], 0))
        self.connections_ended: Counter[str] = Counter()
        """By the server, and why: a bound, or `keepalive`, `protocol`, `alpn`, `resets`, `untrusted`."""
        self.starts = Histogram(START_SECONDS)
        self.bytes_sent = 0
        """Of jobs' output, to followers."""
        self.gaps_sent = 0
        """Gaps of jobs' output that followers were told of."""

    def call(self, rpc: str, status: str) -> None:
        self.calls[rpc, status] += 1

    def refused(self, bound: str) -> None:
        self.refusals[bound] += 1

    def handshake_failed(self, reason: str) -> None:
        self.handshake_failures[kind_of_failure(reason)] += 1

    def connection_ended(self, cause: str) -> None:
        self.connections_ended[cause] += 1
