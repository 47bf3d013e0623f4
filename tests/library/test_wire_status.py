"""An error that a server raises is the error that the SDK raises."""

from __future__ import annotations

import json

import pytest
from grpclib.const import Status

from jobrunner import errors
from jobrunner.errors import JobRunnerError
from jobrunner.wire.status import ERROR_TRAILER, STATUS_OF, error_from_wire, error_to_wire

EXAMPLES: list[tuple[JobRunnerError, Status]] = [
    (errors.InvalidRequest("limits.memory", "-1 is not between"), Status.INVALID_ARGUMENT),
    (errors.JobNotFound("0123456789ab"), Status.NOT_FOUND),
    (errors.JobRemoved("r1", "0123456789ab"), Status.NOT_FOUND),
    (errors.RequestConflict("r1"), Status.ALREADY_EXISTS),
    (errors.OffsetOutOfRange("0123456789ab", 10, 5), Status.OUT_OF_RANGE),
    (errors.Unauthenticated("cannot call Start: no certificate"), Status.UNAUTHENTICATED),
    (errors.PermissionDenied("cannot call Start: viewers may not"), Status.PERMISSION_DENIED),
    (errors.StartFailed("nosuch", "exec", 2), Status.FAILED_PRECONDITION),
    (errors.StopFailed("0123456789ab", "it sleeps"), Status.FAILED_PRECONDITION),
    (errors.HostError("cannot start: no cgroups"), Status.FAILED_PRECONDITION),
    (errors.LimitReached("start job", "max_running", "1000 jobs are running"), Status.RESOURCE_EXHAUSTED),
    (errors.Unavailable("cannot call Start: draining"), Status.UNAVAILABLE),
    (errors.Timeout("cannot call Start: too late"), Status.DEADLINE_EXCEEDED),
    (errors.Unsupported("cannot watch: too old"), Status.UNIMPLEMENTED),
    (errors.InternalError("cannot call Start: a bug"), Status.INTERNAL),
]


@pytest.mark.parametrize(("error", "status"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_an_error_comes_back_with_its_class_message_and_fields(error: JobRunnerError, status: Status) -> None:
    wire = error_to_wire(error)
    assert (wire.status, wire.message) == (status, error.message)
    again = error_from_wire(wire.status, wire.message, wire.trailer)
    assert type(again) is type(error)
    assert again.args == (error.message,)
    assert vars(again) == {name: value for name, value in vars(error).items() if name in vars(again)}
    assert set(STATUS_OF[type(error)].fields) <= set(vars(again))


def test_every_class_that_can_be_raised_has_an_example() -> None:
    assert {type(error) for error, _ in EXAMPLES} == set(STATUS_OF)
    leaves = {getattr(errors, name) for name in errors.__all__} - {errors.WouldBlock, errors.ConfigError, errors.CertificateError}
    assert {cls for cls in leaves if leaves.isdisjoint(cls.__subclasses__())} == set(STATUS_OF)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (Status.NOT_FOUND, errors.JobNotFound),
        (Status.FAILED_PRECONDITION, errors.StartFailed),
        (Status.UNKNOWN, errors.InternalError),
        (Status.CANCELLED, errors.Unavailable),
        (Status.UNIMPLEMENTED, errors.Unsupported),
    ],
)
def test_without_the_trailer_the_class_follows_from_the_status(status: Status, expected: type[JobRunnerError]) -> None:
    error = error_from_wire(status, "the words of another server")
    assert type(error) is expected
    assert error.message == "the words of another server"


@pytest.mark.parametrize(
    "trailer",
    [b"", b"{", b"[]", b"\xff", b'{"class": 5}', b'{"class": "JobRunnerError"}', b'{"class": "StartFailed", "errno": "x"}'],
)
def test_a_trailer_that_makes_no_sense_is_ignored(trailer: bytes) -> None:
    assert type(error_from_wire(Status.NOT_FOUND, "gone", {ERROR_TRAILER: trailer})) is errors.JobNotFound


def test_a_field_of_the_wrong_type_is_the_default() -> None:
    trailer = {ERROR_TRAILER: json.dumps({"class": "StartFailed", "errno": "two", "step": "exec"}).encode()}
    error = error_from_wire(Status.FAILED_PRECONDITION, "no", trailer)
    assert isinstance(error, errors.StartFailed)
    assert (error.errno, error.step) == (0, "exec")


def test_what_is_sent_is_bounded_and_can_be_encoded() -> None:
    wire = error_to_wire(errors.StartFailed("x" * 100_000 + "\udcff", "exec", 2))
    assert len(wire.message) == 1024
    assert len(wire.trailer[ERROR_TRAILER]) < 1024
    error_to_wire(errors.StartFailed("\udcff", "exec", 2)).message.encode()


def test_a_class_without_a_row_goes_as_its_base() -> None:
    class Special(errors.InvalidRequest):
        """Some future error."""

    assert error_to_wire(Special("name", "no")).status is Status.INVALID_ARGUMENT
    assert error_to_wire(JobRunnerError("cannot load configuration: x")).status is Status.INTERNAL
