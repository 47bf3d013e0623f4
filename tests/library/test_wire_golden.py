"""The generated messages against official protobuf: every message, every field, in both directions, byte for byte."""

from __future__ import annotations

import pytest

from jobrunner.wire.codec import StrictCodec
from jobrunner.wire.generated.grpc.health import v1 as health
from jobrunner.wire.generated.grpc.reflection import v1 as reflection
from jobrunner.wire.generated.jobrunner import v1 as jobs
from tests.support.protobuf import filled, official

MODULES = {"jobrunner.v1": jobs, "grpc.health.v1": health, "grpc.reflection.v1": reflection}
MESSAGES = [name for name in official() if name.rpartition(".")[0] in MODULES]
FIELDS = [(name, field.name) for name in MESSAGES for field in official()[name].DESCRIPTOR.fields]


def ours(name: str) -> type:
    package, _, message = name.rpartition(".")
    cls: type = getattr(MODULES[package], message)
    return cls


def test_every_message_of_the_protocol_is_compared() -> None:
    generated = {f"jobrunner.v1.{name}" for name in jobs.__all__ if not name.endswith(("Base", "Stub", "OutputStream"))}
    assert generated == {name for name in MESSAGES if name.startswith("jobrunner.v1.")}
    assert len(generated) == 31


@pytest.mark.parametrize("name", MESSAGES)
def test_an_empty_message_is_no_bytes(name: str) -> None:
    assert StrictCodec().encode(ours(name)(), ours(name)) == official()[name]().SerializeToString() == b""


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_bytes_of_official_protobuf_are_read_and_written_the_same(name: str, field: str) -> None:
    golden = filled(official()[name], only=field).SerializeToString(deterministic=True)
    assert golden
    message = StrictCodec().decode(golden, ours(name))
    assert bytes(message) == StrictCodec().encode(message, ours(name)) == golden
    assert not message._unknown_fields


@pytest.mark.parametrize("name", [name for name in MESSAGES if name not in ("grpc.reflection.v1.ServerReflectionRequest",)])
def test_a_full_message_comes_back_the_same_from_official_protobuf(name: str) -> None:
    theirs = filled(official()[name])
    message = StrictCodec().decode(theirs.SerializeToString(deterministic=True), ours(name))
    assert official()[name].FromString(StrictCodec().encode(message, ours(name))) == theirs


def test_zero_and_absent_are_told_apart_where_the_protocol_says_optional() -> None:
    info = official()["jobrunner.v1.JobInfo"]
    zero = info(exit_code=0).SerializeToString()
    assert StrictCodec().decode(zero, jobs.JobInfo).exit_code == 0
    assert StrictCodec().decode(b"", jobs.JobInfo).exit_code is None
    assert StrictCodec().encode(jobs.JobInfo(exit_code=0), jobs.JobInfo) == zero
