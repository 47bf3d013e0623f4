"""JobService: convert in, call the runner, convert out.

Jobs are the runner's, never a call's: a call that is cancelled leaves the start or stop that it asked for as it is (`runner.start`
and `RunnerJob.stop` see to that).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, cast

from grpclib.const import Cardinality, Handler
from grpclib.server import Stream

from jobrunner import __version__
from jobrunner.bounds import Bounds
from jobrunner.errors import HostError, JobNotFound, JobRemoved, StopFailed, Unsupported
from jobrunner.job import EndReason, Gap, JobInfo, JobStatus
from jobrunner.output import Chunk, Selection
from jobrunner.runner import JobRunner, RunnerJob
from jobrunner.server.auth import current_identity
from jobrunner.server.limits import Counted, Lanes
from jobrunner.server.listing import page
from jobrunner.server.metrics import Metrics
from jobrunner.server.stream import ServerStream
from jobrunner.server.turns import Gate
from jobrunner.wire import messages as pb
from jobrunner.wire.convert import (
    info_to_wire,
    limits_to_wire,
    seconds_from_duration,
    selection_from_wire,
    spec_from_wire,
    workspace_to_wire,
)
from jobrunner.wire.encode import Encoded, encode_output

__all__ = ["JobService"]

PACKAGED = "/jobrunner.v1.JobService/"
ORIGINAL = "/JobService/"
SENDS = 8
"""Parts of output that are sent to the followers of one user in a turn of the event loop: some milliseconds."""
ORIGINAL_CALLS = ("Start", "Stop", "QueryStatus", "SubscribeOutput")


class DrainState(Protocol):
    def is_set(self) -> bool: ...


class JobService(pb.JobServiceBase):
    """The service over one runner."""

    def __init__(self, runner: JobRunner, draining: DrainState, bounds: Bounds, metrics: Metrics) -> None:
        self._runner = runner
        self._draining = draining
        self._metrics = metrics
        self._followers = Counted("max_followers_per_job", bounds.max_followers_per_job)
        self._starts = Lanes(bounds.max_starts_per_user)
        self._lists, self._searches = Lanes(bounds.max_searches_per_user), Lanes(bounds.max_searches_per_user)
        self._sends = Gate(SENDS)

    def __mapping__(self) -> dict[str, Handler]:
        mapping: dict[str, Handler] = super().__mapping__()
        own: dict[str, tuple[Callable[[Stream[Any, Encoded]], Any], Cardinality, type]] = {
            "SubscribeOutput": (self._subscribe_output, Cardinality.UNARY_STREAM, pb.JobSubscriptionRequest),
            "List": (self._list, Cardinality.UNARY_UNARY, pb.JobListRequest),
        }
        for name, (handler, cardinality, request) in own.items():
            mapping[PACKAGED + name] = Handler(handler, cardinality, request, Encoded)
        return mapping | {ORIGINAL + name: mapping[PACKAGED + name] for name in ORIGINAL_CALLS}

    async def start(self, message: pb.JobStartRequest) -> pb.JobStartResponse:
        begun, user = time.monotonic(), current_identity().user
        try:
            spec = spec_from_wire(message)
            job = await self._starts.to_its_end(user, lambda: self._runner.start(spec, user=user))
        except JobRemoved as exc:  # it was started, and once is what was asked for
            return pb.JobStartResponse(job_id=exc.job_id)
        self._metrics.starts.observe(time.monotonic() - begun)
        return pb.JobStartResponse(job_id=job.job_id, info=info_to_wire(job.info(usage=False)))

    async def stop(self, message: pb.JobStopRequest) -> pb.JobStopResponse:
        """Answers in-band, as the original design says: stopped, not found or error."""
        try:
            job = await self._runner.get(message.job_id)
            had_ended = job.status is not JobStatus.RUNNING
            info = await job.stop(grace=seconds_from_duration(message.grace), by=current_identity().user)
        except JobNotFound:
            return pb.JobStopResponse(status="not found", message="Job not found")
        except (StopFailed, HostError) as exc:
            return pb.JobStopResponse(status="error", message=exc.message)
        stopped = info.end_reason is EndReason.STOPPED and not had_ended
        text = "Job successfully stopped" if stopped else f"Job had already ended: {_ending(info)}"
        return pb.JobStopResponse(status="stopped", message=text, info=info_to_wire(info))

    async def query_status(self, message: pb.JobQueryRequest) -> pb.JobInfo:
        return info_to_wire((await self._runner.get(message.job_id)).info())

    async def wait(self, message: pb.JobWaitRequest) -> pb.JobInfo:
        return info_to_wire(await (await self._runner.get(message.job_id)).wait())

    def watch(self, message: pb.JobWatchRequest) -> AsyncIterator[pb.JobEvent]:
        raise Unsupported("cannot watch jobs: this server does not offer it")

    async def remove(self, message: pb.JobRemoveRequest) -> pb.JobRemoveResponse:
        await self._runner.remove(message.job_id)
        return pb.JobRemoveResponse()

    async def write_input(self, messages: AsyncIterator[pb.JobInputRequest]) -> pb.JobInputResponse:
        raise Unsupported("cannot write input: this server does not offer it")

    async def get_server(self, message: pb.GetServerRequest) -> pb.ServerInfo:
        config, host = self._runner.config, self._runner.host
        return pb.ServerInfo(
            version=__version__,
            node=config.node,
            kernel=host.kernel,
            cgroup=self._runner.cgroup_version,
            cpus=host.cpus,
            memory=host.memory,
            running_jobs=self._runner.running,
            max_running_jobs=config.max_running,
            defaults=limits_to_wire(self._runner.defaults),
            ceilings=limits_to_wire(config.ceilings),
            draining=self._draining.is_set() or self._runner.is_closing,
            network_host=config.network_host,
            workspaces=config.workspaces,
            roots=sorted(config.offers.roots),
            users=sorted(config.offers.users),
            volumes=[pb.Volume(name=name, read_only=volume.read_only) for name, volume in sorted(config.offers.volumes.items())],
        )

    async def list_workspaces(self, message: pb.ListWorkspacesRequest) -> pb.ListWorkspacesResponse:
        own = current_identity().user
        found = await self._runner.list_workspaces()
        return pb.ListWorkspacesResponse(
            workspaces=[workspace_to_wire(one) for one in found if message.all_users or one.user == own]
        )

    async def remove_workspace(self, message: pb.RemoveWorkspaceRequest) -> pb.RemoveWorkspaceResponse:
        await self._runner.remove_workspace(message.user or current_identity().user, message.name)
        return pb.RemoveWorkspaceResponse()

    async def _list(self, stream: Stream[pb.JobListRequest, Encoded]) -> None:
        request = await stream.recv_message()
        assert request is not None
        async with self._lists.one(current_identity().user):
            answer = await page(self._runner, request)
        await stream.send_message(answer)

    async def _subscribe_output(self, stream: Stream[pb.JobSubscriptionRequest, Encoded]) -> None:
        """Not through the generated base: chunks are encoded without it, and the reader is closed here, in the call's own task."""
        request = await stream.recv_message()
        assert request is not None
        selection = selection_from_wire(request)
        job = await self._runner.get(request.job_id)
        verb, reason = f"read log of job {job.job_id}", f"{self._followers.most} clients are reading it"
        with self._followers.one_more(job.job_id, verb, reason):
            await self._send_output(stream, job, selection)

    async def _send_output(self, stream: Stream[Any, Encoded], job: RunnerJob, selection: Selection) -> None:
        sending = cast("ServerStream", stream._stream)
        async with job.read(selection) as reader:
            # At once, so that a client knows that it is connected before there is any output.
            await stream.send_initial_metadata()
            if selection.tail is not None or selection.since is not None:
                async with self._searches.one(current_identity().user):
                    begin = await reader.locate()
                await stream.send_message(encode_output(begin))
            user = current_identity().user
            reader.take_at_once(sending.room())
            async for part in reader:
                # A send does not yield while the peer's window is open: fast readers would hold up every other call.
                await self._sends.turn(user)
                await sending.ready()
                await stream.send_message(encode_output(part))
                self._count(part)
                reader.take_at_once(sending.room())
            if reader.end is not None:
                await self._sends.turn(user)
                await stream.send_message(encode_output(reader.end))

    def _count(self, part: Chunk | Gap) -> None:
        if isinstance(part, Gap):
            self._metrics.gaps_sent += 1
        else:
            self._metrics.bytes_sent += len(part.data)


def _ending(info: JobInfo) -> str:
    """`completed, exit code 0`."""
    return f"{info.status}, {info.message}" if info.message else str(info.status)
