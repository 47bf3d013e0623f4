"""The container's health check: asks the server in this container, over mutual TLS, by the standard gRPC health service.

Exits with 0 if it serves; otherwise one line says why, and the exit code is 1.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from grpclib.client import Channel
from grpclib.config import Configuration
from grpclib.exceptions import GRPCError, StreamTerminatedError

from jobrunner.errors import JobRunnerError
from jobrunner.tls import client_context
from jobrunner.units import parse_address
from jobrunner.wire import messages as pb

CERTS = Path("/certs")
DEADLINE = 5.0


async def health(port: int) -> pb.HealthCheckResponseServingStatus:
    """What the server on this port of loopback says of itself; its certificate has to be for `localhost` too."""
    context = client_context(CERTS / "ca.pem", CERTS / "health.pem", CERTS / "health.key")
    name = Configuration(ssl_target_name_override="localhost")
    async with Channel("127.0.0.1", port, ssl=context, config=name) as channel:
        return (await pb.HealthStub(channel).check(pb.HealthCheckRequest(), timeout=DEADLINE)).status


def main() -> None:
    _, port = parse_address(os.environ.get("JOBRUNNERD_LISTEN", "0.0.0.0:7443"))
    try:
        status = asyncio.run(health(port))
    except (JobRunnerError, GRPCError, StreamTerminatedError, OSError) as error:  # TimeoutError is an OSError
        sys.exit(f"cannot check health: {error}")
    print(status.name)
    sys.exit(status != pb.HealthCheckResponseServingStatus.SERVING)


if __name__ == "__main__":
    main()
