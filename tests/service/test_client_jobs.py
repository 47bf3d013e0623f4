"""The SDK's verbs on a real server: the library's values and exceptions, across the network."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import anyio
import pytest

from jobrunner import EndReason, JobNotFound, JobSpec, JobStatus, Limits, StartFailed, Stream
from jobrunner.errors import InvalidRequest, OffsetOutOfRange, PermissionDenied, RequestConflict
from jobrunner.output import Chunk

if TYPE_CHECKING:
    from tests.support.daemon import ServerProcess

pytestmark = pytest.mark.requires("root")


async def test_a_job_from_its_start_to_its_end(server: ServerProcess) -> None:
    with anyio.fail_after(20):
        async with server.client() as client:
            job = await client.start("sh", "-c", "echo out; echo err >&2; exit 3", name="whole", limits=Limits(memory=64 << 20))
            async with job.log() as reader:
                parts = [part async for part in reader if isinstance(part, Chunk)]
            info = await job.wait()
    assert b"".join(part.data for part in parts if part.stream is Stream.STDOUT) == b"out\n"
    assert b"".join(part.data for part in parts if part.stream is Stream.STDERR) == b"err\n"
    assert (info.status, info.end_reason, info.exit_code) == (JobStatus.FAILED, EndReason.EXITED, 3)
    assert (info.name, info.user, info.limits.memory, info.log_end) == ("whole", "admin", 64 << 20, 8)
    assert reader.end is not None
    assert reader.end.total_bytes == 8
    assert reader.end.info is not None
    assert reader.end.info.status is JobStatus.FAILED


async def test_stop_returns_how_the_job_ended(server: ServerProcess) -> None:
    with anyio.fail_after(20):
        async with server.client() as client:
            job = await client.start(JobSpec("sleep", ("1000",)))
            assert await job.status() is JobStatus.RUNNING
            info = await job.stop()
            again = await job.stop()
    assert (info.status, info.end_reason, info.stopped_by, info.signal) == (JobStatus.TERMINATED, EndReason.STOPPED, "admin", 15)
    assert again == info


async def test_errors_are_the_library_s_classes_with_their_values(server: ServerProcess) -> None:
    missing = "0123456789ab"
    with anyio.fail_after(20):
        async with server.client() as client:
            with pytest.raises(StartFailed) as start:
                await client.start("no-such-command")
            with pytest.raises(InvalidRequest) as invalid:
                await client.start("true", limits=Limits(read_iops=1), cwd="relative")
            with pytest.raises(JobNotFound) as not_found:
                await client.get(missing).stop()
            with pytest.raises(JobNotFound):
                await client.get(missing).wait()
            with pytest.raises(JobNotFound):
                await anext(client.get(missing).log())
    assert (start.value.step, start.value.errno, start.value.command) == ("exec", 2, "no-such-command")
    assert invalid.value.field == "cwd"
    assert not_found.value.job_id == missing


async def test_an_offset_past_the_end_is_told_with_the_end(server: ServerProcess) -> None:
    with anyio.fail_after(20):
        async with server.client() as client:
            job = await client.start("printf", "123")
            await job.wait()
            with pytest.raises(OffsetOutOfRange) as caught:
                await anext(job.log(4))
    assert (caught.value.offset, caught.value.end) == (4, 3)


async def test_a_viewer_may_not_start_stop_or_remove(server: ServerProcess) -> None:
    with anyio.fail_after(20):
        async with server.client() as admin, server.client("viewer") as viewer:
            job = await admin.start("sleep", "1000")
            with pytest.raises(PermissionDenied):
                await viewer.start("true")
            with pytest.raises(PermissionDenied):
                await viewer.get(job.job_id).stop()
            with pytest.raises(PermissionDenied):
                await viewer.remove(job.job_id)
            assert await viewer.get(job.job_id).status() is JobStatus.RUNNING
            await job.stop(grace=0)


async def test_a_request_id_makes_a_start_happen_once(server: ServerProcess) -> None:
    request_id = secrets.token_hex(8)
    with anyio.fail_after(20):
        async with server.client() as client:
            jobs = [await client.start("true", request_id=request_id) for _ in range(3)]
            with pytest.raises(RequestConflict):
                await client.start("false", request_id=request_id)
    assert len({job.job_id for job in jobs}) == 1


async def test_list_finds_jobs_by_label_and_reads_every_page(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobrunner.client.client.PAGE", 2)
    label = {"case": secrets.token_hex(4)}
    with anyio.fail_after(30):
        async with server.client() as client:
            started = [(await client.start("true", labels=label)).job_id for _ in range(5)]
            listed = [info.job_id for info in await client.list(labels=label)]
    assert listed == started[::-1]


async def test_many_calls_at_once_share_one_connection(server: ServerProcess) -> None:
    with anyio.fail_after(30):
        async with server.client() as client:
            job = await client.start("true")
            await job.wait()
            statuses = []

            async def ask() -> None:
                statuses.append(await job.status())

            async with anyio.create_task_group() as tasks:
                for _ in range(200):
                    tasks.start_soon(ask)
    assert statuses == [JobStatus.COMPLETED] * 200


async def test_an_unread_log_does_not_hold_back_other_calls(server: ServerProcess) -> None:
    with anyio.fail_after(30):
        async with server.client() as client:
            job = await client.start("yes")
            async with job.log() as reader:
                await anext(reader)
                for _ in range(20):
                    assert await job.status() is JobStatus.RUNNING
                info = await job.stop(grace=0)
    assert info.status is JobStatus.TERMINATED


async def test_what_the_server_says_of_itself(server: ServerProcess) -> None:
    with anyio.fail_after(20):
        async with server.client("viewer") as client:
            facts = await client.server()
    assert facts.cgroup in ("v1", "hybrid", "v2")
    assert facts.cpus > 0
    assert (facts.defaults.cpus, facts.defaults.memory, facts.defaults.pids) == (1.0, 1 << 30, 512)
    assert facts.network_host is False
