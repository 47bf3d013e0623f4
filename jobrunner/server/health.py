"""The standard health service: https://github.com/grpc/grpc/blob/master/doc/health-checking.md"""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from jobrunner.errors import Unavailable
from jobrunner.wire import messages as pb

__all__ = ["HealthService"]

Serving = pb.HealthCheckResponseServingStatus
SERVICES = ("", "jobrunner.v1.JobService", "JobService")


class HealthService(pb.HealthBase):
    """SERVING until the server drains."""

    def __init__(self, draining: anyio.Event) -> None:
        self._draining = draining

    async def check(self, message: pb.HealthCheckRequest) -> pb.HealthCheckResponse:
        if message.service not in SERVICES:
            raise GRPCError(Status.NOT_FOUND, f'cannot check health: "{message.service}" is no service of this server')
        return pb.HealthCheckResponse(status=self._status())

    async def watch(self, message: pb.HealthCheckRequest) -> AsyncIterator[pb.HealthCheckResponse]:
        known = message.service in SERVICES
        yield pb.HealthCheckResponse(status=self._status() if known else Serving.SERVICE_UNKNOWN)
        was_draining = self._draining.is_set()
        await self._draining.wait()
        if known and not was_draining:
            yield pb.HealthCheckResponse(status=Serving.NOT_SERVING)
        raise Unavailable("cannot watch health: the server is shutting down")

    def _status(self) -> Serving:
        return Serving.NOT_SERVING if self._draining.is_set() else Serving.SERVING
