"""The audit log of a real server: a line for each decision, and nothing of a request's secrets anywhere."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from jobrunner.errors import ConfigError, PermissionDenied, Unauthenticated, Unavailable
from jobrunner.server.audit import Audit
from tests.support.cli import jobrunner
from tests.support.daemon import ServerProcess, server_process
from tests.support.server import eventually
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root")
SECRET = "hunter2-94c1fd"


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("audited")
    before = os.environ.get("JOBRUNNERD_AUDIT_LOG")
    os.environ["JOBRUNNERD_AUDIT_LOG"] = str(directory / "audit.jsonl")
    try:
        with server_process(directory) as server:
            yield server
    finally:
        os.environ.pop("JOBRUNNERD_AUDIT_LOG")
        assert before is None


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
    assert int(done["serial"], 16) > 1 << 60
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
    with pytest.raises(Unavailable, match="cannot call Start: the audit log cannot be written"):
        audit.begin({}, "/jobrunner.v1.JobService/Start", changes=True, unary=True)
    audit.begin({}, "/jobrunner.v1.JobService/List", changes=False, unary=True)
    audit.close()


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
        assert [line for line in processes() if SECRET in line] == []
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


def processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found
