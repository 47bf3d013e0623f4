"""A gRPC server that speaks real TLS and HTTP/2 and answers SubscribeOutput as the test says, right or wrong.

The real server cannot be made to leave out the end of a log, to be older than its client, or to be silent.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from grpclib.const import Cardinality, Handler
from grpclib.server import Server, Stream

from jobrunner.client import JobClient
from jobrunner.server.devcerts import make_certs
from jobrunner.tls import server_context
from jobrunner.wire import messages as pb
from jobrunner.wire.codec import StrictCodec

if TYPE_CHECKING:
    from pathlib import Path

Answer = Callable[[Any], Awaitable[None]]
Output = Stream[pb.JobSubscriptionRequest, pb.JobOutputResponse]


class Peer:
    """Only these two calls are there: any other is UNIMPLEMENTED."""

    def __init__(self, output: Answer | None, status: Answer | None) -> None:
        self._answers = {"SubscribeOutput": output, "QueryStatus": status}

    def __mapping__(self) -> dict[str, Handler]:
        kinds = {
            "SubscribeOutput": (Cardinality.UNARY_STREAM, pb.JobSubscriptionRequest, pb.JobOutputResponse),
            "QueryStatus": (Cardinality.UNARY_UNARY, pb.JobQueryRequest, pb.JobInfo),
        }
        return {
            f"/jobrunner.v1.JobService/{name}": Handler(answer, *kinds[name])
            for name, answer in self._answers.items()
            if answer is not None
        }


def client_of(address: str, trusted: Path, own: Path, timeout: float = 10.0, resume_timeout: float = 0.0) -> JobClient:
    """A client that trusts the CA of one directory of certificates, and is the admin of another. It tries everything once."""
    ca, cert, key = trusted / "ca.pem", own / "admin.pem", own / "admin.key"
    return JobClient(address, ca=ca, cert=cert, key=key, timeout=timeout, resume_timeout=resume_timeout)


@asynccontextmanager
async def peer_client(
    path: Path, *, output: Answer | None = None, status: Answer | None = None, timeout: float = 10.0, resume_timeout: float = 0.0
) -> AsyncIterator[tuple[JobClient, Server]]:
    """An open client of such a server, and the server."""
    make_certs(path)
    server = Server([Peer(output, status)], codec=StrictCodec())
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    await server.start(sock=listener, ssl=server_context(path / "ca.pem", path / "server.pem", path / "server.key"))
    try:
        async with client_of(f"127.0.0.1:{port}", path, path, timeout, resume_timeout) as client:
            yield client, server
    finally:
        server.close()
        await server.wait_closed()
