"""Health and reflection as official clients see them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from tests.support.protobuf import official
from tests.support.server import Running, failure, invoke, serving

pytestmark = pytest.mark.requires("root")

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
HEALTH = "grpc.health.v1.HealthCheckResponse"
V1, V1ALPHA = "grpc.reflection.v1", "grpc.reflection.v1alpha"


async def ask(running: Running, *questions: dict[str, Any], package: str = V1) -> list[Any]:
    """The answers to these questions, in one call."""
    request = official()["grpc.reflection.v1.ServerReflectionRequest"]

    async def requests() -> AsyncIterator[Any]:
        for question in questions:
            yield request(**question)

    async with running.channel(user="viewer") as channel:
        path = f"/{package}.ServerReflection/ServerReflectionInfo"
        call = invoke(channel, path, "grpc.reflection.v1.ServerReflectionResponse", "stream_stream")
        with anyio.fail_after(10):
            return [answer async for answer in call(requests())]


@pytest.mark.parametrize("package", [V1, V1ALPHA])
async def test_the_services_are_listed(tmp_path: Path, package: str) -> None:
    async with serving(tmp_path) as running:
        (answer,) = await ask(running, {"list_services": ""}, package=package)
        names = [service.name for service in answer.list_services_response.service]
        assert names == ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "jobrunner.v1.JobService"]


@pytest.mark.parametrize(
    "question",
    [
        {"file_containing_symbol": "jobrunner.v1.JobService"},
        {"file_containing_symbol": "jobrunner.v1.JobService.Start"},
        {"file_containing_symbol": "jobrunner.v1.JobStartRequest.EnvEntry"},
        {"file_containing_symbol": "jobrunner.v1.OutputStream"},
        {"file_by_filename": "jobrunner/v1/jobs.proto"},
    ],
)
async def test_official_protobuf_can_build_the_service_from_the_answer(tmp_path: Path, question: dict[str, str]) -> None:
    async with serving(tmp_path) as running:
        (answer,) = await ask(running, question)
    files = [descriptor_pb2.FileDescriptorProto.FromString(raw) for raw in answer.file_descriptor_response.file_descriptor_proto]
    assert files[0].name == "jobrunner/v1/jobs.proto"
    pool = descriptor_pool.DescriptorPool()
    for file in reversed(files):
        pool.Add(file)
    service = pool.FindServiceByName("jobrunner.v1.JobService")
    assert service.methods_by_name["SubscribeOutput"].output_type.full_name == "jobrunner.v1.JobOutputResponse"


async def test_each_question_is_answered_in_turn_and_unknown_names_are_errors_of_the_answer(tmp_path: Path) -> None:
    async with serving(tmp_path) as running:
        answers = await ask(
            running,
            {"file_containing_symbol": "no.Such"},
            {"file_by_filename": "no/such.proto"},
            {"all_extension_numbers_of_type": "jobrunner.v1.JobInfo"},
            {"all_extension_numbers_of_type": "no.Such"},
            {"host": "here"},
        )
    codes = [answer.error_response.error_code for answer in answers]
    assert codes == [5, 5, 0, 5, 3]  # NOT_FOUND and INVALID_ARGUMENT
    assert answers[2].all_extension_numbers_response.base_type_name == "jobrunner.v1.JobInfo"
    assert (answers[4].valid_host, answers[4].original_request.host) == ("here", "here")


@pytest.mark.parametrize("service", ["", "jobrunner.v1.JobService", "JobService"])
async def test_health_is_serving(tmp_path: Path, service: str) -> None:
    request = official()["grpc.health.v1.HealthCheckRequest"](service=service).SerializeToString()
    async with serving(tmp_path) as running, running.channel(user="viewer") as channel:
        assert (await invoke(channel, CHECK, HEALTH)(request)).status == 1  # SERVING
        assert (await invoke(channel, WATCH, HEALTH, "unary_stream")(request).read()).status == 1


async def test_the_health_of_an_unknown_service_is_not_found(tmp_path: Path) -> None:
    request = official()["grpc.health.v1.HealthCheckRequest"](service="nosuch").SerializeToString()
    async with serving(tmp_path) as running, running.channel() as channel:
        told = await failure(invoke(channel, CHECK, HEALTH)(request))
        assert told[0] is grpc.StatusCode.NOT_FOUND
        watch = invoke(channel, WATCH, HEALTH, "unary_stream")(request)
        assert (await watch.read()).status == 3  # SERVICE_UNKNOWN
        watch.cancel()
