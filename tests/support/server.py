"""A real server on a real socket with a real runner, and official gRPC clients for it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import grpc
import grpc.aio
import pytest

from jobrunner.bounds import READERS, Bounds
from jobrunner.config import RunnerConfig, ServerConfig
from jobrunner.server.process import running_server
from tests.support.certs import CertificateAuthority, Pair
from tests.support.protobuf import official

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from jobrunner.runner import JobRunner
    from jobrunner.server.app import JobServer

SERVICE = "/jobrunner.v1.JobService"
GRPC_ERROR = grpc.aio.AioRpcError


@dataclass(frozen=True, slots=True)
class Running:
    """A server and what its clients need."""

    address: str
    server: JobServer
    runner: JobRunner
    authority: CertificateAuthority
    metrics: str = ""
    """Where metrics are, HOST:PORT."""

    def pair(self, user: str, unit: str) -> Pair:
        """A client's certificate with this OU, made when it is asked for."""
        pair = Pair(self.authority.directory / f"{user}.pem", self.authority.directory / f"{user}.key")
        return pair if pair.cert.exists() else self.authority.issue(user, [unit])

    @asynccontextmanager
    async def channel(self, pair: Pair | None = None, user: str = "admin") -> AsyncIterator[grpc.aio.Channel]:
        """An official gRPC channel, as `admin` or `viewer` or with this certificate."""
        pair = pair or self.pair(user, user)
        async with official_channel(self.address, self.authority.pem, pair) as channel:
            yield channel


@asynccontextmanager
async def official_channel(
    address: str, ca: Path, pair: Pair | None, options: Sequence[tuple[str, Any]] = ()
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel with this client certificate, or with none."""
    files = (pair.key.read_bytes(), pair.cert.read_bytes()) if pair else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), *files)
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        yield channel


@asynccontextmanager
async def serving(path: Path, *, keep_jobs: bool = False, **settings: Any) -> AsyncIterator[Running]:
    """Serve below `path`; settings are ServerConfig's and Bounds', and those of RunnerConfig under `runner`.

    Jobs are stopped in the end, unless kept.
    """
    authority = CertificateAuthority(path / "certs")
    pair = authority.issue_server()
    runner = RunnerConfig(state_dir=path / "state", **settings.pop("runner", {}))
    settings.setdefault("listen", "127.0.0.1:0")
    bounds = Bounds(**{name: settings.pop(name) for name in READERS.keys() & settings})
    config = ServerConfig(runner=runner, bounds=bounds, ca=authority.pem, cert=pair.cert, key=pair.key, **settings)
    async with running_server(config) as running:
        try:
            yield Running(running.address, running.server, running.runner, authority, running.metrics)
        finally:
            with anyio.CancelScope(shield=True), anyio.fail_after(30):
                for job in [] if keep_jobs else await running.runner.list():
                    await job.stop(grace=0)


def message(name: str, **fields: Any) -> Any:
    """An official message of jobrunner.v1."""
    return official()[f"jobrunner.v1.{name}"](**fields)


def invoke(channel: grpc.aio.Channel, path: str, reply: str, kind: str = "unary_unary") -> Any:
    """The call of any RPC, to be given an official message or bytes; the answer is of type `reply`, or bytes if that is empty."""
    encode = lambda request: request if isinstance(request, bytes) else request.SerializeToString()  # noqa: E731
    return getattr(channel, kind)(path, encode, official()[reply].FromString if reply else None)


def unary(channel: grpc.aio.Channel, method: str, reply: str) -> Any:
    """The call of one unary RPC; `reply` is the type of its answer."""
    return invoke(channel, f"{SERVICE}/{method}", f"jobrunner.v1.{reply}")


def subscribe(channel: grpc.aio.Channel, **fields: Any) -> Any:
    """A call of SubscribeOutput: an async iterator of JobOutputResponse."""
    call = invoke(channel, f"{SERVICE}/SubscribeOutput", "jobrunner.v1.JobOutputResponse", "unary_stream")
    return call(message("JobSubscriptionRequest", **fields))


async def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Until this holds, where nothing tells that it does."""
    with anyio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    """The status and message that a call fails with. The error itself is not kept: it would keep the connection."""
    try:
        answer = await call
    except GRPC_ERROR as exc:
        return exc.code(), exc.details() or ""
    pytest.fail(f"the call was answered: {answer}")


async def start(channel: grpc.aio.Channel, command: str, *args: str, **fields: Any) -> str:
    """Start a job; its id."""
    reply = await unary(channel, "Start", "JobStartResponse")(message("JobStartRequest", command=command, args=args, **fields))
    return str(reply.job_id)
