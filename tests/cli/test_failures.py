"""Every failure is one line on standard error and an exit code of its own, never a traceback."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from jobrunner import errors
from jobrunner_cli.exitcodes import CODES
from tests.support.cli import Result, jobrunner, shell, start, stop, wait

if TYPE_CHECKING:
    from tests.support.daemon import ServerProcess

pytestmark = pytest.mark.requires("root")

NO_ID = "0123456789ab"


def assert_fails(result: Result, code: int, pattern: str) -> None:
    assert result.code == code, result
    assert result.out == b""
    assert result.err.endswith("\n")
    assert result.err.count("\n") == 1, result.err
    assert re.fullmatch(rf"jobrunner: {pattern}\n", result.err), result.err


def unreachable() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("verb", ["status", "stop", "log", "wait", "info", "rm"])
@pytest.mark.parametrize("job_id", [NO_ID, "no-id", "../../etc"])
def test_an_unknown_id(server: ServerProcess, verb: str, job_id: str) -> None:
    assert_fails(jobrunner(server, verb, job_id), 66, rf'cannot find job "{re.escape(job_id)}": no such job')


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        ("no-such-command", 127, "No such file or directory"),
        ("/no/such/command", 127, "No such file or directory"),
        ("/etc/passwd", 126, "Permission denied"),
        ("/usr", 126, "(Permission denied|Is a directory)"),
        ("/etc/passwd/x", 126, "Not a directory"),
    ],
)
@pytest.mark.parametrize("verb", ["start", "run"])
def test_a_command_that_cannot_be_executed(server: ServerProcess, verb: str, command: str, code: int, reason: str) -> None:
    assert_fails(jobrunner(server, verb, command), code, f'cannot start "{command}": exec: .*{reason}')


def test_a_working_directory_that_is_not_there(server: ServerProcess) -> None:
    assert_fails(
        jobrunner(server, "start", "--cwd", "/no/such", "true"), 73, r'cannot start "true": cwd: .*No such file or directory'
    )


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["start", ""], "command"),
        (["start", "--memory", "lots", "true"], "limits.memory"),
        (["start", "--memory", "-1", "true"], "limits.memory"),
        (["start", "--memory", "0", "true"], "limits.memory"),
        (["start", "--cpus", "0", "true"], "limits.cpus"),
        (["start", "--cpus", "nan", "true"], "limits.cpus"),
        (["start", "--cpus", "x", "true"], "limits.cpus"),
        (["start", "--pids", "1.5", "true"], "limits.pids"),
        (["start", "--timeout", "soon", "true"], "limits.timeout"),
        (["start", "--cpus", "inf", "true"], "limits.cpus"),
        (["start", "--write-bps", "1", "true"], "limits.write_bps"),
        (["start", "--memory", str(1 << 63), "true"], "limits.memory"),
        (["start", "--pids", str(1 << 64), "true"], "limits.pids"),
        (["start", "--open-files", "3", "true"], "limits.open_files"),
        (["start", "--env", "NOVALUE", "true"], "env"),
        (["start", "--label", "x", "true"], "labels"),
        (["start", "--cwd", "relative", "true"], "cwd"),
        (["start", "--name", "a b", "true"], "name"),
        (["start", "--stop-signal", "NOPE", "true"], "stop_signal"),
        (["start", "--grace", "-1", "true"], "grace"),
        (["start", "echo", os.fsdecode(b"\xff")], "args[0]"),
        (["stop", "--grace", "x", NO_ID], "grace"),
        (["stop", "--grace", "9223372036854775808", NO_ID], "grace"),
        (["workspace", "rm", os.fsdecode(b"\xff")], "request"),
        (["ls", "--name", os.fsdecode(b"\xff")], "request"),
        (["log", "--tail", "9" * 19, "--since", "now", NO_ID], "since"),
        (["log", "--offset", "-1", NO_ID], "offset"),
        (["log", "--stream", "stdin", NO_ID], "stream"),
        (["ls", "--status", "dead"], "status"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_bad_value_names_its_field(server: ServerProcess, words: list[str], field: str) -> None:
    assert_fails(jobrunner(server, *words), 65, rf"cannot \w+ \w+( {NO_ID})?: {re.escape(field)}: .+")


@pytest.mark.parametrize(
    "words", [["start"], ["status"], ["nope"], ["start", "--nope", "ls"], ["log", "-f"], ["start", "--memory"]]
)
def test_a_command_line_that_cannot_be_understood(server: ServerProcess, words: list[str]) -> None:
    assert_fails(jobrunner(server, *words), 2, r".+ \(see `jobrunner.* --help`\)")


@pytest.mark.parametrize("words", [["start", "true"], ["run", "true"], ["stop", NO_ID], ["rm", NO_ID]])
def test_a_role_that_does_not_allow_it(server: ServerProcess, words: list[str]) -> None:
    assert_fails(jobrunner(server, *words, user="viewer"), 77, r"cannot .+viewer.*")


def test_a_certificate_without_a_known_role(server: ServerProcess) -> None:
    assert_fails(jobrunner(server, "ls", user="nobody"), 77, r"cannot .+")


def test_a_certificate_of_another_ca(server: ServerProcess) -> None:
    reason = r"cannot reach \S+: the server rejected the client certificate: it is not signed by the server's CA"
    assert_fails(jobrunner(server, "ls", user="stranger"), 67, reason)


def test_a_server_of_another_ca(server: ServerProcess) -> None:
    other = str(server.stranger / "ca.pem")
    reason = r"cannot reach \S+: the server's certificate is not acceptable: it is not signed by the CA given \(.+\)"
    assert_fails(jobrunner(server, "--ca", other, "ls"), 67, reason)


def test_a_server_whose_certificate_is_for_another_name(server: ServerProcess) -> None:
    # The resolver reads 127.1 as 127.0.0.1, and the certificate does not hold it.
    address = server.address.replace("127.0.0.1", "127.1")
    result = jobrunner(server, "--address", address, "ls")
    assert_fails(result, 67, r"cannot reach \S+: the server's certificate is not acceptable: .+127\.1.*")


def test_a_server_that_is_away(server: ServerProcess) -> None:
    address = unreachable()
    assert_fails(jobrunner(server, "--address", address, "ls"), 69, f"cannot reach {address}: Connection refused")


def test_a_server_whose_name_is_not_known(server: ServerProcess) -> None:
    assert_fails(jobrunner(server, "--address", "no-such-host.invalid:1", "ls"), 69, r"cannot reach \S+: .+")


def test_a_peer_that_speaks_no_tls(server: ServerProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        environ = server.environ() | {"JOBRUNNER_ADDRESS": address}
        program = str(Path(sys.executable).with_name("jobrunner"))
        with subprocess.Popen([program, "ls"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            connection, _ = listener.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()
            out, err = process.communicate(timeout=20)
    assert_fails(Result(process.returncode, out, err.decode()), 69, r"cannot reach \S+: TLS failed: .+")


@pytest.mark.parametrize(("option", "name"), [("--ca", "CA certificate"), ("--cert", "certificate"), ("--key", "key")])
def test_a_certificate_file_that_is_missing(server: ServerProcess, option: str, name: str) -> None:
    assert_fails(jobrunner(server, option, "/no/file", "ls"), 78, f"cannot read {name} /no/file: No such file or directory")


@pytest.mark.parametrize("missing", ["ADDRESS", "CA", "CERT", "KEY"])
def test_a_setting_that_is_missing_is_named(server: ServerProcess, missing: str) -> None:
    environ = server.environ()
    del environ[f"JOBRUNNER_{missing}"]
    program = str(Path(sys.executable).with_name("jobrunner"))
    done = subprocess.run([program, "ls"], env=environ, capture_output=True, text=True, timeout=30, check=False)
    expected = f"cannot read --{missing.lower()} or JOBRUNNER_{missing}: neither is set"
    assert_fails(Result(done.returncode, done.stdout.encode(), done.stderr), 78, expected)


@pytest.mark.parametrize("address", ["nowhere", "host:port", "host:0", "::1:7443", "host:70000"])
def test_an_address_that_is_none(server: ServerProcess, address: str) -> None:
    assert_fails(jobrunner(server, "--address", address, "ls"), 78, r"cannot read address: .+")


def test_an_offset_past_the_end_of_an_ended_log(server: ServerProcess) -> None:
    job_id = shell(server, "printf 123")
    wait(server, job_id)
    assert_fails(
        jobrunner(server, "log", "--offset", "4", job_id), 79, f"cannot read log of job {job_id}: offset 4 is past its end, 3"
    )


def test_a_request_id_that_was_used_for_another_request(server: ServerProcess) -> None:
    start(server, "--request-id", "used", "true")
    result = jobrunner(server, "start", "--request-id", "used", "false")
    assert_fails(result, 68, 'cannot start job: request_id: "used" was used for another request')


def test_removing_a_job_that_runs(server: ServerProcess) -> None:
    job_id = start(server, "sleep", "1000")
    assert_fails(jobrunner(server, "rm", job_id), 65, r"cannot remove job.*: .+")
    stop(server, job_id)


def test_a_closed_standard_output(server: ServerProcess) -> None:
    job_id = shell(server, "echo x")
    wait(server, job_id)
    program = Path(sys.executable).with_name("jobrunner")
    done = subprocess.run(
        ["sh", "-c", f"exec {program} log {job_id} >&-"],
        env=server.environ(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    expected = "cannot write to standard output: Bad file descriptor"
    assert_fails(Result(done.returncode, done.stdout.encode(), done.stderr), 74, expected)


def test_every_error_has_an_exit_code_that_no_other_has() -> None:
    classes = {getattr(errors, name) for name in errors.__all__} - {errors.CallerError, errors.AccessError, errors.WouldBlock}
    assert classes <= set(CODES)
    codes = [code for cls, code in CODES.items() if cls is not errors.JobRunnerError]
    assert len(codes) == len(set(codes))
    assert not {0, 1, 2} & set(codes)
