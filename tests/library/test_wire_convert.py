"""Values travel: from_wire(to_wire(x)) == x, through the bytes."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobrunner.errors import InvalidRequest
from jobrunner.job import EndReason, JobInfo, JobSpec, JobStatus, Limits, OutputPolicy, Stream, Usage
from jobrunner.output import Selection
from jobrunner.wire import convert
from jobrunner.wire import messages as pb
from jobrunner.wire.codec import StrictCodec

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy host is no failure."""

micros = 1_000_000
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
sizes = st.none() | st.integers(1 << 20, 1 << 62)
counts = st.none() | st.integers(2, 1 << 22)
seconds = st.none() | st.integers(1000, 86_400 * micros).map(lambda value: value / micros)
moments = st.integers(1, 4_000_000_000 * micros).map(lambda value: value / micros)
labels = st.dictionaries(texts.filter(bool), texts, max_size=3)
sized = ("memory", "read_bps", "write_bps", "output_limit", "open_files", "read_iops", "write_iops")
directories = st.none() | st.integers(1 << 16, 1 << 60)
limits = st.builds(
    Limits,
    cpus=st.none() | st.floats(0.01, 4096.0),
    pids=counts,
    timeout=seconds,
    idle_timeout=seconds,
    output_policy=st.none() | st.sampled_from(OutputPolicy),
    **dict.fromkeys(sized, sizes),
    **dict.fromkeys(("tmp_size", "work_size"), directories),
)
durations = ("cpu_user", "cpu_system", "throttled", "wall")
counters = ("memory", "memory_peak", "pids", "pids_peak", "read_bytes", "write_bytes", "read_ops", "write_ops", "oom_kills")
usages = st.builds(Usage, **dict.fromkeys(durations, seconds), **dict.fromkeys(counters, st.none() | st.integers(0, (1 << 64) - 1)))
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
specs = st.builds(
    JobSpec,
    command=texts.filter(bool),
    args=st.lists(texts, max_size=4),
    name=st.just("") | names,
    env=st.dictionaries(texts.filter(lambda name: name and "=" not in name), texts, max_size=3),
    cwd=st.just("") | texts.map(lambda text: f"/{text}"),
    limits=limits,
    labels=labels,
    request_id=texts,
    merge=st.booleans(),
    stop_signal=st.sampled_from(["TERM", "SIGINT", "9"]),
    grace=st.none() | st.just(0.0) | seconds,
    root=st.just("") | names,
    writable=st.booleans(),
    network=st.sampled_from(["", "none", "host"]),
    user=st.just("") | names,
    volumes=st.lists(names | names.map(lambda name: f"{name}:ro"), max_size=3, unique_by=lambda text: text.removesuffix(":ro")),
    workspace=st.just("") | names,
    stdin=st.booleans(),
)
codes = st.none() | st.integers(0, 255)
infos = st.builds(
    JobInfo,
    job_id=st.from_regex(r"[0-9a-f]{12}", fullmatch=True),
    status=st.sampled_from(JobStatus),
    command=texts,
    args=st.lists(texts, max_size=4).map(tuple),
    name=texts,
    labels=labels,
    user=texts,
    node=texts,
    created=moments,
    started=st.none() | moments,
    ended=st.none() | moments,
    network=st.sampled_from(["", "none", "host"]),
    root=texts,
    writable=st.booleans(),
    volumes=st.lists(names | names.map(lambda name: f"{name}:ro"), max_size=3).map(tuple),
    workspace=texts,
    work=texts,
    runs_as=texts,
    end_reason=st.none() | st.sampled_from(EndReason) | st.just("a_newer_word"),
    exit_code=codes,
    signal=codes,
    limits=limits,
    missing=st.lists(texts, max_size=2).map(tuple),
    usage=usages,
    log_start=st.integers(0, 1 << 63),
    log_end=st.integers(0, 1 << 63),
    stopped_by=texts,
    message=texts,
)


@UNHURRIED
@given(specs)
def test_a_request_comes_back_the_same(spec: JobSpec) -> None:
    data = bytes(convert.spec_to_wire(spec))
    assert convert.spec_from_wire(StrictCodec().decode(data, pb.JobStartRequest)) == spec


@UNHURRIED
@given(infos)
def test_an_info_comes_back_the_same(info: JobInfo) -> None:
    data = bytes(convert.info_to_wire(info))
    assert convert.info_from_wire(StrictCodec().decode(data, pb.JobInfo)) == info


@UNHURRIED
@given(moments)
def test_a_time_is_exact_to_the_microsecond(moment: float) -> None:
    there = convert.datetime_from_seconds(moment)
    assert there is not None
    assert (there - convert.EPOCH) // timedelta(microseconds=1) == round(moment * micros)
    assert convert.seconds_from_datetime(there) == moment


@pytest.mark.parametrize(
    ("table", "value", "by_hand"),
    [
        (convert.SPEC, JobSpec, set()),
        (convert.LIMITS, Limits, set()),
        (convert.USAGE, Usage, set()),
        (convert.INFO, JobInfo, {"log_start", "log_end"}),
    ],
)
def test_a_table_has_every_field_of_its_value(table: dict[str, convert.Field], value: Any, by_hand: set[str]) -> None:
    assert set(table) | by_hand == {field.name for field in dataclasses.fields(value)}


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (JobSpec("\udcff"), "command"),
        (JobSpec("ls", ("ok", "\udcff")), r"args\[1\]"),
        (JobSpec("ls", env={"A": "\udcff"}), r"env\[A\]"),
        (JobSpec("ls", cwd="/\udcff"), "cwd"),
    ],
)
def test_a_text_that_is_not_unicode_is_refused_by_name(spec: JobSpec, field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field}: is not Unicode"):
        convert.spec_to_wire(spec)


def test_an_info_with_bytes_that_are_not_unicode_can_be_told() -> None:
    info = JobInfo("0123456789ab", JobStatus.RUNNING, "caf\udce9", ("\udcff",))
    again = convert.info_from_wire(StrictCodec().decode(bytes(convert.info_to_wire(info)), pb.JobInfo))
    assert (again.command, again.args) == ("caf�", ("�",))


def test_an_empty_stop_signal_is_the_default() -> None:
    assert convert.spec_from_wire(pb.JobStartRequest(command="ls")) == JobSpec("ls")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.JobStartRequest(), "command"),
        (pb.JobStartRequest(command="ls", args=["a\0b"]), r"args\[0\]"),
        (pb.JobStartRequest(command="ls", limits=pb.Limits(memory=0)), "limits.memory"),
        (pb.JobStartRequest(command="ls", limits=pb.Limits(memory=(1 << 64) - 1)), "limits.memory"),
        (pb.JobStartRequest(command="ls", limits=pb.Limits(cpus=float("nan"))), "limits.cpus"),
        (pb.JobStartRequest(command="ls", limits=pb.Limits(output_policy="loud")), "limits.output_policy"),
        (pb.JobStartRequest(command="ls", grace=timedelta(seconds=-1)), "grace"),
        (pb.JobStartRequest(command="ls", stop_signal="NOSUCH"), "stop_signal"),
        (pb.JobStartRequest(command="ls", volumes=[pb.Volume(name="a:ro")]), "volumes"),
    ],
)
def test_a_request_that_no_job_can_have_is_refused_by_field(message: pb.JobStartRequest, field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"cannot start job: {field}: "):
        convert.spec_from_wire(message)


def test_words_of_a_newer_server_are_tolerated() -> None:
    message = pb.JobInfo(job_id="0123456789ab", status="paused", end_reason="evicted", limits=pb.Limits(output_policy="loud"))
    info = convert.info_from_wire(message)
    assert (info.status, info.end_reason, info.limits.output_policy) == (JobStatus.RUNNING, "evicted", None)


def test_a_newer_kind_of_output_message_carries_no_output() -> None:
    assert convert.output_from_wire(pb.JobOutputResponse(offset=7)) is None


selections = st.builds(
    lambda since, until, **others: Selection(since=since, until=max(since, until) if since and until else until, **others),
    since=st.none() | moments,
    until=st.none() | moments,
    follow=st.booleans(),
    streams=st.sampled_from([frozenset({Stream.STDOUT}), frozenset({Stream.STDERR}), frozenset(Stream)]),
    exact_times=st.booleans(),
)


@UNHURRIED
@given(selections, st.fixed_dictionaries({"offset": st.integers(0, 1 << 62)}) | st.fixed_dictionaries({"tail": st.integers(0, 9)}))
def test_what_to_read_comes_back_the_same(selection: Selection, where: dict[str, int]) -> None:
    asked = dataclasses.replace(selection, **where)  # type: ignore[arg-type]
    message = convert.selection_to_wire("0123456789ab", asked)
    assert convert.selection_from_wire(StrictCodec().decode(bytes(message), pb.JobSubscriptionRequest)) == asked


def test_a_subscription_of_the_original_design_follows_both_streams_from_the_first_byte() -> None:
    assert convert.selection_from_wire(pb.JobSubscriptionRequest(job_id="0123456789ab")) == Selection()


def test_a_stream_that_no_job_has_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="cannot read log: streams: 7"):
        convert.selection_from_wire(pb.JobSubscriptionRequest(streams=[pb.OutputStream(7)]))
