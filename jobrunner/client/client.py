"""JobClient: the library's verbs, on a server."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio.to_thread
from grpclib.const import Cardinality
from grpclib.exceptions import GRPCError

from jobrunner.client.channel import ClientChannel
from jobrunner.client.errors import Interrupted, translated
from jobrunner.client.reader import ClientOutputReader, OutputCall
from jobrunner.client.resume import Attempts, Connection
from jobrunner.errors import ConfigError, InternalError, InvalidRequest, JobNotFound, JobRunnerError, LimitReached, StopFailed
from jobrunner.job import EndReason, JobInfo, JobSpec, JobStatus, Limits, Stream, Workspace
from jobrunner.output import Selection
from jobrunner.spec import MAX_GRACE
from jobrunner.tls import client_context
from jobrunner.units import parse_address
from jobrunner.wire import messages as pb
from jobrunner.wire.codec import Encoded, StrictCodec
from jobrunner.wire.convert import info_from_wire, limits_from_wire, spec_to_wire, timedelta_from_seconds, workspace_from_wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

__all__ = ["ClientJob", "JobClient", "ServerFacts"]

SERVICE = "/jobrunner.v1.JobService"
VARIABLES = ("JOBRUNNER_ADDRESS", "JOBRUNNER_CA", "JOBRUNNER_CERT", "JOBRUNNER_KEY")
PAGE = 1000
STOPPED = "Job successfully stopped"

_Reply = TypeVar("_Reply")


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself. Sizes in bytes."""

    version: str
    node: str
    kernel: str
    cgroup: str
    """`v1`, `hybrid` or `v2`."""
    cpus: int
    memory: int
    running_jobs: int
    max_running_jobs: int
    defaults: Limits
    ceilings: Limits
    draining: bool
    network_host: bool
    """Whether a job may ask for the host's network."""
    workspaces: bool
    """Whether a job may ask for a workspace."""
    roots: tuple[str, ...]
    volumes: tuple[str, ...]
    """Names that a job may ask for; `NAME:ro` where it may not write."""
    users: tuple[str, ...] = ()


class JobClient:
    """Jobs on the server at `address`, HOST:PORT. Use as an async context manager; one client serves many tasks at once.

    `timeout` is the deadline of one call in seconds. Calls that wait for a job have none: `wait`, reading a log, and `stop`
    without a grace period of its own, for the job's may be any. Keepalive tells within 30 s that a server is gone.

    When the connection is lost, or the server restarts, readers go on where they were, and `wait`, `stop` and `start` are repeated
    (a start under its request id, so that it happens once), until there was no progress for `resume_timeout` seconds; 0 for not at
    all. `tell` is called with the error when the connection is lost, and with None when the server is reached again.
    """

    def __init__(
        self,
        address: str,
        *,
        ca: str | os.PathLike[str],
        cert: str | os.PathLike[str],
        key: str | os.PathLike[str],
        key_passphrase_file: str | os.PathLike[str] | None = None,
        timeout: float = 30.0,
        resume_timeout: float = 60.0,
        tell: Callable[[JobRunnerError | None], None] | None = None,
    ) -> None:
        self.address = address
        self.timeout = timeout
        self._connection = Connection(resume_timeout, tell)
        self._host, self._port = _split(address)
        self._files = (Path(ca), Path(cert), Path(key))
        self._passphrase_file = Path(key_passphrase_file) if key_passphrase_file is not None else None
        self._open: ClientChannel | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, timeout: float = 30.0) -> JobClient:
        """From JOBRUNNER_ADDRESS, _CA, _CERT and _KEY; ConfigError names the one that is not set. _KEY_PASSPHRASE_FILE may be."""
        environ = os.environ if environ is None else environ
        for name in VARIABLES:
            if not environ.get(name):
                raise ConfigError(name, "it is not set")
        address, ca, cert, key = (environ[name] for name in VARIABLES)
        passphrase_file = environ.get("JOBRUNNER_KEY_PASSPHRASE_FILE") or None
        return cls(address, ca=ca, cert=cert, key=key, key_passphrase_file=passphrase_file, timeout=timeout)

    def __repr__(self) -> str:
        return f"<JobClient {self.address} {'open' if self._open else 'closed'}>"

    async def __aenter__(self) -> Self:
        """Reads the certificates; connects on the first call. ConfigError says which file cannot be read, and why."""
        read = partial(client_context, *self._files, passphrase_file=self._passphrase_file)
        context = await anyio.to_thread.run_sync(read, abandon_on_cancel=True)
        self._open = ClientChannel(self._host, self._port, context, StrictCodec(), self._connection.back)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._open is not None:
            channel, self._open = self._open, None
            await channel.aclose()

    async def start(self, spec: JobSpec | str, *args: str, **fields: Any) -> ClientJob:
        """Start a job: `start(JobSpec(...))`, or `start("echo", "hi", name="x")` with the fields of JobSpec.

        A request id is made where none is given, so that this very request, when it is repeated, cannot start it twice.
        Raises InvalidRequest, StartFailed, LimitReached, RequestConflict.
        """
        if isinstance(spec, str):
            spec = JobSpec(spec, args, **fields)
        elif args or fields:
            raise TypeError("start() takes either a JobSpec, or a command with arguments and fields")
        if not spec.request_id:
            spec = replace(spec, request_id=secrets.token_hex(16))
        call = partial(self._unary, "Start", spec_to_wire(spec), pb.JobStartResponse, "start job", self.timeout)
        reply, _ = await self._repeated(call, told=False)
        return ClientJob(self, reply.job_id)

    def get(self, job_id: str) -> ClientJob:
        """A job by its id; asks nobody: the first call on it tells whether there is one. JobNotFound for what is no text."""
        try:
            job_id.encode()
        except UnicodeEncodeError as exc:
            raise JobNotFound(job_id.encode("utf-8", "backslashreplace").decode()) from exc
        return ClientJob(self, job_id)

    async def remove(self, job_id: str) -> None:
        """Remove an ended job's record and log. Raises JobNotFound; InvalidRequest if it runs."""
        await self._unary("Remove", pb.JobRemoveRequest(job_id=job_id), pb.JobRemoveResponse, f"remove job {job_id}", self.timeout)

    async def server(self) -> ServerFacts:
        """What the server is, has and allows."""
        reply = await self._unary("GetServer", pb.GetServerRequest(), pb.ServerInfo, "ask server", self.timeout)
        return ServerFacts(
            version=reply.version,
            node=reply.node,
            kernel=reply.kernel,
            cgroup=reply.cgroup,
            cpus=reply.cpus,
            memory=reply.memory,
            running_jobs=reply.running_jobs,
            max_running_jobs=reply.max_running_jobs,
            defaults=limits_from_wire(reply.defaults),
            ceilings=limits_from_wire(reply.ceilings),
            draining=reply.draining,
            network_host=reply.network_host,
            workspaces=reply.workspaces,
            roots=tuple(reply.roots),
            users=tuple(reply.users),
            volumes=tuple(f"{volume.name}:ro" if volume.read_only else volume.name for volume in reply.volumes),
        )

    async def list(
        self,
        *,
        statuses: Collection[JobStatus | str] = (),
        labels: Mapping[str, str] | None = None,
        name: str = "",
    ) -> Sequence[JobInfo]:
        """Jobs, newest first: of these statuses, with all of these labels, of this name; all that there are by default."""
        jobs: list[JobInfo] = []
        cursor = ""
        while True:
            request = pb.JobListRequest(
                statuses=[str(status) for status in statuses], labels=dict(labels or {}), name=name, page_size=PAGE, cursor=cursor
            )
            reply = await self._unary("List", request, pb.JobListResponse, "list jobs", self.timeout)
            jobs.extend(map(info_from_wire, reply.jobs))
            cursor = reply.next_cursor
            if not cursor:
                return jobs

    async def workspaces(self, *, all_users: bool = False) -> Sequence[Workspace]:
        """The caller's workspaces, or everyone's."""
        request = pb.ListWorkspacesRequest(all_users=all_users)
        reply = await self._unary("ListWorkspaces", request, pb.ListWorkspacesResponse, "list workspaces", self.timeout)
        return [workspace_from_wire(one) for one in reply.workspaces]

    async def remove_workspace(self, name: str, *, user: str = "") -> None:
        """Remove a workspace of the caller's, or of this user's. Raises InvalidRequest if there is none, or a job has it."""
        request = pb.RemoveWorkspaceRequest(name=name, user=user)
        await self._unary("RemoveWorkspace", request, pb.RemoveWorkspaceResponse, "remove workspace", self.timeout)

    @property
    def _channel(self) -> ClientChannel:
        if self._open is None:
            raise JobRunnerError(f"cannot reach {self.address}: the client is not open, use `async with`")
        return self._open

    async def _unary(self, method: str, request: Any, reply_type: type[_Reply], verb: str, timeout: float | None) -> _Reply:
        """One call with one answer. `verb` is what fails if it fails, `timeout` its deadline in seconds.

        Made again when the server says that it comes too fast, after the pause that it asks for, if the deadline allows.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + (self.timeout if timeout is None else timeout)
        while True:
            try:
                return await self._once(method, request, reply_type, verb, timeout)
            except LimitReached as exc:
                pause = exc.retry_after * random.uniform(1.0, 1.5)  # many that were refused together do not come back together
                if not exc.retry_after or loop.time() + pause > give_up_at:
                    raise
                await asyncio.sleep(pause)

    async def _once(self, method: str, request: Any, reply_type: type[_Reply], verb: str, timeout: float | None) -> _Reply:
        attempts = Attempts(self._connection, self._channel)
        while True:
            try:
                return await self._called(method, request, reply_type, verb, timeout)
            except Interrupted as exc:  # nothing has come of it: the server has not said a word
                await attempts.again(exc)

    async def _called(self, method: str, request: Any, reply_type: type[_Reply], verb: str, timeout: float | None) -> _Reply:
        channel = self._channel
        async with translated(channel, verb, timeout) as attempt:
            path = f"{SERVICE}/{method}"
            async with channel.request(path, Cardinality.UNARY_UNARY, type(request), reply_type, timeout=timeout) as call:
                attempt.call = call
                await call.send_message(request, end=True)
                reply = await call.recv_message()
                await call.recv_trailing_metadata()
            if reply is None:
                raise InternalError(f"cannot {verb}: {self.address} answered without a message")
            return reply

    async def _repeated(self, call: Callable[[], Awaitable[_Reply]], *, told: bool = True) -> tuple[_Reply, bool]:
        """A call that may be made again when the connection was lost; its answer, and whether it was made again.

        With `told` also when the server said that it is unavailable: one that ends tells so to those who wait.
        """
        attempts = Attempts(self._connection, self._channel)
        again = False
        while True:
            try:
                reply = await call()
            except JobRunnerError as exc:
                if not told and not again and isinstance(exc.__cause__, GRPCError):
                    raise
                await attempts.again(exc)
                again = True
            else:
                attempts.answered()
                return reply, again

    def _output_call(self) -> OutputCall:
        path = f"{SERVICE}/SubscribeOutput"
        return self._channel.request(path, Cardinality.UNARY_STREAM, pb.JobSubscriptionRequest, Encoded)


class ClientJob:
    """One job on a server. Every call raises JobNotFound if there is none with this id."""

    def __init__(self, client: JobClient, job_id: str) -> None:
        self.job_id = job_id
        self._client = client

    def __repr__(self) -> str:
        return f"<ClientJob {self.job_id} at {self._client.address}>"

    async def status(self) -> JobStatus:
        """One of the four words."""
        return (await self.info()).status

    async def info(self) -> JobInfo:
        """Everything known of it now."""
        request = pb.JobQueryRequest(job_id=self.job_id)
        return info_from_wire(
            await self._client._unary("QueryStatus", request, pb.JobInfo, f"query job {self.job_id}", self._client.timeout)
        )

    async def stop(self, grace: float | None = None) -> JobInfo:
        """Stop it, and return when it is gone: the stop signal, `grace` seconds (the job's own if None), then the kill.

        A job that has ended already is no error. Raises StopFailed if its processes do not go away.
        """
        return (await self.stop_told(grace))[0]

    async def stop_told(self, grace: float | None = None) -> tuple[JobInfo, str]:
        """As `stop`, with the server's sentence, which says whether the job had ended already."""
        if grace is not None and not 0 <= grace <= MAX_GRACE:
            raise InvalidRequest("grace", f"{grace} is not between 0 and {MAX_GRACE}", verb=f"stop job {self.job_id}")
        request = pb.JobStopRequest(job_id=self.job_id, grace=timedelta_from_seconds(grace))
        verb = f"stop job {self.job_id}"
        timeout = None if grace is None else self._client.timeout + grace
        call = partial(self._client._unary, "Stop", request, pb.JobStopResponse, verb, timeout)
        reply, again = await self._client._repeated(call)
        match reply.status:
            case "not found":
                raise JobNotFound(self.job_id)
            case "stopped":
                info = info_from_wire(reply.info) if reply.info is not None else await self.info()
                # Asked again, a job that the first request has stopped had already ended.
                return info, STOPPED if again and info.end_reason is EndReason.STOPPED else reply.message
            case _:
                raise StopFailed(self.job_id, reply.message.removeprefix(f"cannot {verb}: "))

    async def wait(self) -> JobInfo:
        """Return when it has ended."""
        request = pb.JobWaitRequest(job_id=self.job_id)
        call = partial(self._client._unary, "Wait", request, pb.JobInfo, f"wait for job {self.job_id}", None)
        reply, _ = await self._client._repeated(call)
        return info_from_wire(reply)

    def log(
        self,
        offset: int = 0,
        *,
        follow: bool = True,
        streams: Collection[Stream] = tuple(Stream),
        tail: int | None = None,
        since: float | None = None,
        until: float | None = None,
        exact_times: bool = False,
    ) -> ClientOutputReader:
        """Its output; to its end (`follow`), or as much as there is now.

        From an offset of the merged log on, or the last `tail` lines; what was written from `since` on and before `until`, seconds
        since the epoch: `output.Selection` says it exactly. Raises InvalidRequest. Asks the server on the first read, so
        JobNotFound and OffsetOutOfRange come from there.
        """
        return self.read(
            Selection(
                offset=offset,
                follow=follow,
                streams=frozenset(streams),
                tail=tail,
                since=since,
                until=until,
                exact_times=exact_times,
            )
        )

    def read(self, selection: Selection) -> ClientOutputReader:
        """As `log`, of a selection that was made before."""
        client = self._client
        return ClientOutputReader(client._channel, client._connection, client._output_call, self.job_id, selection)


def _split(address: str) -> tuple[str, int]:
    """HOST and PORT; ConfigError if the text is no address of a server."""
    try:
        host, port = parse_address(address)
        if port == 0:
            raise ValueError("port 0 is no server's")
    except ValueError as exc:
        raise ConfigError("address", str(exc)) from exc
    return host, port
