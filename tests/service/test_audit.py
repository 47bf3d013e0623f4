"""The audit log of a real server: a line for each decision, and nothing of a request's secrets anywhere."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from jobrunner.client import JobClient
from jobrunner.errors import ConfigError, PermissionDenied, Unauthenticated, Unavailable
from jobrunner.pki import describe
from jobrunner.server.account import Account
from jobrunner.server.audit import Audit
from jobrunner.server.metrics import Metrics
from tests.support.cli import jobrunner
from tests.support.daemon import ServerProcess, server_process
from tests.support.http2 import framed, raw_peer
from tests.support.server import eventually, serving
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root")
SECRET = "hunter2-94c1fd"
QUERY = "/jobrunner.v1.JobService/QueryStatus"
SUBSCRIBE = "/jobrunner.v1.JobService/SubscribeOutput"


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("audited")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOBRUNNERD_AUDIT_LOG", str(directory / "audit.jsonl"))
        patch.setenv("JOBRUNNERD_METRICS_LISTEN", "127.0.0.1:0")
        with server_process(directory) as server:
            yield server


def lines(server: ServerProcess, name: str = "audit.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (server.state.parent / name).read_text().splitlines()]


async def test_a_call_is_told_before_it_is_made_and_before_its_answer(audited: ServerProcess) -> None:
    begun = len(lines(audited))
    async with audited.client() as client:
        job = await client.start("true")
        told = lines(audited)[begun:]
        await job.wait()
    allowed, done = told
    who = {"user": "admin", "role": "admin", "rpc": "/jobrunner.v1.JobService/Start", "call": allowed["call"]}
    assert who.items() <= allowed.items()
    assert who.items() <= done.items()
    assert (allowed["event"], done["event"]) == ("allowed", "done")
    assert (done["job"], done["outcome"]) == (job.job_id, "OK")
    assert done["seconds"] > 0
    assert done["address"].startswith("127.0.0.1:")
    (shown,) = describe(audited.certs / "admin.pem")
    assert done["serial"] == shown.serial
    assert done["time"] > allowed["time"]


async def test_a_denial_says_who_what_and_why(audited: ServerProcess) -> None:
    begun = len(lines(audited))
    async with audited.client("viewer") as client:
        with pytest.raises(PermissionDenied):
            await client.get("0123456789ab").stop()
    (denied,) = lines(audited)[begun:]
    assert denied["event"] == "denied"
    assert (denied["user"], denied["role"], denied["rpc"]) == ("viewer", "viewer", "/jobrunner.v1.JobService/Stop")
    assert denied["reason"] == "cannot call Stop: the role viewer does not allow it"


async def test_a_follower_is_told_at_its_begin_and_at_its_end(audited: ServerProcess) -> None:
    begun = len(lines(audited))
    async with audited.client("viewer") as viewer, audited.client() as admin:
        job = await admin.start("sleep", "1000")
        async with viewer.get(job.job_id).log() as reader:
            with anyio.move_on_after(0.1):
                await reader.next_line()
            await eventually(
                lambda: any(line["event"] == "allowed" and line["user"] == "viewer" for line in lines(audited)[begun:])
            )
        await eventually(lambda: any(line.get("outcome") == "CANCELLED" for line in lines(audited)[begun:]))
        (end,) = [line for line in lines(audited)[begun:] if line["event"] == "done" and line["user"] == "viewer"]
        assert (end["job"], end["rpc"]) == (job.job_id, "/jobrunner.v1.JobService/SubscribeOutput")
        await job.stop(grace=0)


async def test_a_failed_handshake_is_in_it(audited: ServerProcess) -> None:
    begun = len(lines(audited))
    async with audited.client("stranger") as client:
        with pytest.raises(Unauthenticated):
            await client.list()
    told = lines(audited)[begun:]
    assert {line["event"] for line in told} == {"handshake"}
    assert "unable to get local issuer certificate" in {line["reason"] for line in told}


async def test_an_outcome_is_the_status_and_nothing_of_the_request(audited: ServerProcess) -> None:
    begun = len(lines(audited))
    async with audited.client() as client:
        with pytest.raises(Exception, match=SECRET):
            await client.start(f"/no/{SECRET}")
    told = (audited.state.parent / "audit.jsonl").read_text().splitlines()[begun:]
    assert json.loads(told[-1])["outcome"] == "FAILED_PRECONDITION"
    assert SECRET not in "".join(told)


def test_it_is_its_owners_alone_and_opened_anew_on_sighup(audited: ServerProcess) -> None:
    path = audited.state.parent / "audit.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.rename(path.with_name("audit.old"))
    audited.process.send_signal(signal.SIGHUP)
    anyio.run(eventually, path.exists, at_most(10))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_while_it_cannot_be_written_nothing_is_changed(tmp_path: Path) -> None:
    """/dev/full takes no byte (full(4))."""
    (tmp_path / "audit").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="cannot read audit log"):
        Audit(tmp_path / "audit")
    audit = Audit(Path("/dev/full"))
    account = Account(audit, Metrics())
    with pytest.raises(Unavailable, match="cannot call Start: the audit log cannot be written"):
        account.begin({}, "/jobrunner.v1.JobService/Start", changes=True, unary=True)
    account.begin({}, "/jobrunner.v1.JobService/List", changes=False, unary=True)
    audit.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two pages."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


async def test_a_full_disk_is_told_refuses_changes_and_leaves_whole_lines_behind_it(
    tmp_path: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, filler = small_disk / "audit.jsonl", small_disk / "filler"
    async with serving(tmp_path, audit_log=log, metrics_listen="127.0.0.1:0") as running:
        pair = running.pair("admin", "admin")
        async with JobClient(running.address, ca=running.authority.pem, cert=pair.cert, key=pair.key) as client:
            await client.list()
            filler.write_bytes(b"x" * 4096)

            async def start_many() -> None:
                for _ in range(100):
                    await client.start("true")

            with pytest.raises(Unavailable, match="cannot call Start: the audit log cannot be written"):
                await start_many()
            assert await client.list(), "what only looks goes on"
            assert b"jobrunner_audit_failing 1" in await scraped(running.metrics)
            assert [text for text in caplog.messages if text.startswith(f"cannot write audit log {log}: No space left")]
            before = len(await running.runner.list())
            filler.unlink()
            await client.start("true")
            assert len(await running.runner.list()) == before + 1
            assert b"jobrunner_audit_failing 0" in await scraped(running.metrics)
    torn, whole = [], []
    for line in log.read_text().splitlines():
        try:
            whole.append(json.loads(line))
        except ValueError:
            torn.append(line)
    assert len(torn) <= 1 and (whole[-1]["event"], whole[-1]["outcome"]) == ("done", "OK")


async def scraped(address: str) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


def test_a_pipe_that_nobody_reads_holds_up_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "audit")
    audit = Audit(tmp_path / "audit")
    written = [audit.write("denied", reason="x" * 500) for _ in range(1000)]
    assert written[0] and not written[-1]
    audit.close()


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    log.write_text('{"event": "don')
    audit = Audit(log)
    assert audit.write("denied", reason="one")
    assert audit.write("denied", reason="two")
    audit.close()
    assert [json.loads(line)["reason"] for line in log.read_text().splitlines()[1:]] == ["one", "two"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_refusals_and_ends_of_connections_are_told_with_who_and_why(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    async with serving(tmp_path, audit_log=log, max_calls_per_second=0.1, max_streams_per_connection=1) as running:
        async with raw_peer(running, "viewer") as peer:
            for _ in range(2):
                await peer.status(await peer.request(QUERY, framed(b"")))
        async with raw_peer(running, "viewer", alpn=None) as peer:
            await peer.wait_lost()
        async with raw_peer(running) as peer:
            await peer.receive()
            peer.writer.write(b"\0\0\x05\x06\0\0\0\0\0hello")  # a PING that is too short
            await peer.wait_lost()
        host, _, port = running.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.transport.abort()
        await eventually(lambda: read(log)[-1]["event"] == "handshake")
    told = {line["event"]: line for line in read(log)}
    assert told["refused"]["bound"] == "max_calls_per_second"
    assert told["refused"]["rpc"] == QUERY
    assert told["refused"]["reason"].startswith('cannot call QueryStatus: user "viewer" makes more than 0.1 calls a second')
    ends = [(line["user"], line["reason"]) for line in read(log) if line["event"] == "cut"]
    assert ends[0] == ("viewer", "it does not speak HTTP/2 (ALPN h2)")
    assert ends[1][0] == "admin" and ends[1][1].startswith("cannot go on: ")
    assert told["handshake"]["reason"] == "the client closed the connection: it may not accept the server's certificate"


async def test_a_stream_that_is_denied_is_told(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    async with serving(tmp_path, audit_log=log, viewer_output=False) as running, raw_peer(running, "viewer") as peer:
        assert (await peer.status(await peer.request(SUBSCRIBE, framed(b""))))[0] == "7"
    (line,) = read(log)
    assert (line["event"], line["rpc"], line["user"]) == ("denied", SUBSCRIBE, "viewer")


async def test_a_flood_is_counted_and_one_peer_does_not_hide_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobrunner.server.account.SUM_UP", 0.01)
    log = tmp_path / "audit.jsonl"
    account = Account(Audit(log), Metrics())
    for _ in range(5000):
        account.handshake_failed("10.0.0.1:1", "unsupported protocol")
    account.handshake_failed("10.0.0.2:1", "certificate has expired")
    await eventually(lambda: "times" in read(log)[-1])
    told = read(log)
    assert len(told) < 50
    assert told[-2]["address"] == "10.0.0.2:1"
    assert told[-1]["times"] + len(told) - 1 == 5001
    assert account.metrics.handshake_failures["version"] == 5000
    account.audit.close()


def test_the_value_of_a_variable_is_nowhere_but_in_its_job(audited: ServerProcess, tmp_path: Path) -> None:
    """Not on disk, in no command line, in no answer: only the environment of the job itself has it."""
    file = tmp_path / "env"
    file.write_text(f"# comment\n\nPASSWORD={SECRET}\nOTHER=a=b # c\n")
    begun = jobrunner(audited, "start", "--env-file", str(file), "--", "sh", "-c", "echo ${#PASSWORD} $OTHER; sleep 1000")
    job = begun.text.split()[-1]
    try:
        for words in (["info", job], ["info", "--json", job], ["ls"], ["ls", "--json"], ["status", job]):
            said = jobrunner(audited, *words)
            assert said.code == 0
            assert SECRET not in said.text + said.err
        assert [line for line in processes("cmdline") if SECRET in line] == []
        metrics = audited.log.decode().partition("metrics on http://")[2].partition("/")[0]
        homes = {re.findall(r"HOME=([^\0]*)", environ)[0] for environ in processes("environ") if SECRET in environ}
        assert homes == {"/work"}, "the job's own"
        assert SECRET not in anyio.run(scraped, metrics).decode()
        told = "".join(path.read_text(errors="replace") for path in audited.state.parent.rglob("*") if path.is_file())
        assert SECRET not in told and "PASSWORD" in told, "names are kept, values are not"
        assert SECRET not in audited.log.decode()
        wanted = f"{len(SECRET)} a=b # c\n".encode()
        anyio.run(eventually, lambda: jobrunner(audited, "log", job).out == wanted, at_most(10))
    finally:
        jobrunner(audited, "stop", "--grace", "0", job)


def test_a_line_that_is_no_variable_is_told_by_its_number_alone(audited: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "env").write_text(f"A=1\n{SECRET}\n")
    said = jobrunner(audited, "start", "--env-file", str(tmp_path / "env"), "true")
    assert said.err == f"jobrunner: cannot read environment file {tmp_path}/env: line 2 is not NAME=VALUE\n"
    assert said.code == 78


def processes(what: str) -> list[str]:
    found = []
    for path in Path("/proc").glob(f"[0-9]*/{what}"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found


async def test_requests_that_are_no_calls_are_denied_and_a_flood_of_them_is_counted(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    async with serving(tmp_path, audit_log=log) as running, raw_peer(running) as peer:
        assert (await peer.status(await peer.request("/jobrunner.v1.JobService/start", framed(b""))))[0] == "12"
        (told,) = [json.loads(line) for line in log.read_text().splitlines()]
        assert (told["event"], told["user"], told["rpc"], told["reason"]) == (
            "denied",
            "admin",
            "/jobrunner.v1.JobService/start",
            "Method not found",
        )
        assert (await peer.status(await peer.request("/evil\x1b[2J", framed(b"")))) == ("12", "Method not found")
        peer.h2.config.validate_outbound_headers = peer.h2.config.normalize_outbound_headers = False
        for _ in range(40):
            assert await peer.status(await peer.request(QUERY, framed(b""), headers=(("connection", "close"),))) == ("", "")
        running.server.account.sum_up()
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["event"] for line in told} == {"denied"}
    assert told[2]["reason"].startswith("the request is malformed: ")
    assert len(told) < 30
    assert sum(line.get("times", 1) for line in told) == 42
