"""A client generated from the original design's text, unedited, by the official grpcio-tools."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import anyio
import grpc
import grpc.aio
import pytest

from tests.support.server import Running, serving

pytestmark = pytest.mark.requires("root")

DESIGN = Path(__file__).resolve().parents[2] / "docs" / "original-design.md"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The generated messages and stubs. The text says no syntax; everything else of it is as it stands."""
    directory = tmp_path_factory.mktemp("original")
    text = re.search(r"```proto\n(.*?)```", DESIGN.read_text(), re.DOTALL)
    assert text is not None
    (directory / "original_design.proto").write_text(f'syntax = "proto3";\n{text[1]}')
    out = [f"--python_out={directory}", f"--grpc_python_out={directory}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{directory}", *out, "original_design.proto"], check=True)
    sys.path.insert(0, str(directory))
    try:
        yield importlib.import_module("original_design_pb2"), importlib.import_module("original_design_pb2_grpc")
    finally:
        sys.path.remove(str(directory))


async def test_it_starts_streams_queries_and_stops(tmp_path: Path, original: tuple[ModuleType, ModuleType]) -> None:
    pb2, stubs = original
    async with serving(tmp_path) as running, running.channel() as channel:
        stub = stubs.JobServiceStub(channel)
        script = "echo Hello World; echo problem >&2; exec sleep 60"
        with anyio.fail_after(20):
            job_id = (await stub.Start(pb2.JobStartRequest(command="bash", args=["-c", script]))).jobId
            assert (await stub.QueryStatus(pb2.JobQueryRequest(jobId=job_id))).status == "running"
            output = stub.SubscribeOutput(pb2.JobSubscriptionRequest(jobId=job_id))
            stdout = stderr = b""
            while len(stdout + stderr) < 20:
                part = await output.read()
                stdout, stderr = stdout + part.stdout, stderr + part.stderr
            assert (stdout, stderr) == (b"Hello World\n", b"problem\n")
            stopped = await stub.Stop(pb2.JobStopRequest(jobId=job_id))
            assert (stopped.status, stopped.message) == ("stopped", "Job successfully stopped")
            end = await output.read()  # in fields that this client does not know
            assert (end.stdout, end.stderr) == (b"", b"")
            assert await output.read() is grpc.aio.EOF
            assert await output.code() is grpc.StatusCode.OK
            assert (await stub.QueryStatus(pb2.JobQueryRequest(jobId=job_id))).status == "terminated"


async def test_it_starts_what_the_design_starts(tmp_path: Path, original: tuple[ModuleType, ModuleType]) -> None:
    async with serving(tmp_path) as running:
        assert await output_of(running, original, "echo", ["Hello World"]) == b"Hello World\n"
        assert await output_of(running, original, "bash", ["-c", "echo Hello World"]) == b"Hello World\n"


async def output_of(running: Running, original: tuple[ModuleType, ModuleType], command: str, args: list[str]) -> bytes:
    pb2, stubs = original
    async with running.channel() as channel:
        stub = stubs.JobServiceStub(channel)
        with anyio.fail_after(20):
            job_id = (await stub.Start(pb2.JobStartRequest(command=command, args=args))).jobId
            return b"".join([part.stdout async for part in stub.SubscribeOutput(pb2.JobSubscriptionRequest(jobId=job_id))])
