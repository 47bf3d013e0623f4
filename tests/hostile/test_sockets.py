"""What listens on the host, and the job's own pipe in a stranger's hands."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tests.hostile.arena import Arena, program
from tests.hostile.meeting import Meeting, take_over
from tests.support.timing import at_most, fail_after

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.requires("root", "command:python3")]


@pytest.fixture
def abstract() -> Iterator[str]:
    name = f"jobrunner-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        yield f"@{name}"


async def test_abstract_sockets_of_the_host_are_not_there(arena: Arena, abstract: str) -> None:
    assert (await arena.attack("sockets", "connect_unix", abstract)).text == "refused: ECONNREFUSED"
    assert (await arena.attack("sockets", "connect_unix", abstract, without=["network"])).text == "succeeded: connected"


async def test_services_on_the_hosts_loopback_are_not_there(arena: Arena) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = "127.0.0.1", str(listener.getsockname()[1])
        assert (await arena.attack("sockets", "connect_tcp", *where)).text == "refused: ECONNREFUSED"
        assert (await arena.attack("sockets", "connect_tcp", *where, without=["network"])).text == "succeeded: connected"


async def test_sockets_in_run_are_not_there(arena: Arena) -> None:
    """Anybody may connect to D-Bus or docker's clones; a read-only /run would not hinder it."""
    path = Path(f"/run/jobrunner-test-{os.getpid()}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        try:
            path.chmod(0o777)
            listener.listen()
            assert (await arena.attack("sockets", "connect_unix", str(path))).text == "refused: ENOENT"
            assert (await arena.attack("sockets", "connect_unix", str(path), without=["root"])).text == "succeeded: connected"
        finally:
            path.unlink()


async def test_terminals_of_the_host_are_not_there(arena: Arena) -> None:
    ours, theirs = os.openpty()
    try:
        name = os.ttyname(theirs)
        assert (await arena.attack("sockets", "write_terminal", name)).text == "refused: ENOENT"
        assert (await arena.attack("sockets", "write_terminal", name, without=["root"])).text == "refused: EACCES"
        assert (await arena.attack("sockets", "write_terminal", name, without=["uid"])).text == "refused: ENOENT"
        assert (await arena.attack("sockets", "write_terminal", name, without=["root", "uid"])).text == "succeeded: written"
    finally:
        os.close(ours)
        os.close(theirs)


async def test_output_in_a_strangers_hands_holds_nothing_up(arena: Arena) -> None:
    """A process outside that was handed the pipe writes to it while the job lives, and to nobody afterwards."""
    with Meeting() as meeting:
        job = await arena.start(*program("sockets", "hand_over_output", meeting.inside), change={"volumes": [meeting.volume]})
        stranger, pipe = await anyio.to_thread.run_sync(take_over, meeting.listener)
        try:
            os.write(pipe, b"the stranger\n")
            stranger.close()
            outcome = await arena.outcome(job)
            with contextlib.suppress(BrokenPipeError):
                os.write(pipe, b"too late\n")
        finally:
            os.close(pipe)
    assert outcome.text == "succeeded: handed over"
    assert outcome.output == b"the stranger\nsucceeded: handed over\n"
    assert outcome.info.log_end == len(outcome.output)


async def test_a_stranger_who_never_stops_writing_holds_nothing_up(arena: Arena) -> None:
    """As fast as it is read, on and on: what is in the pipe at the end is read, and no more."""
    with Meeting() as meeting:
        job = await arena.start(*program("sockets", "hand_over_output", meeting.inside), change={"volumes": [meeting.volume]})
        stranger, pipe = await anyio.to_thread.run_sync(take_over, meeting.listener)
        with ThreadPoolExecutor() as pool:
            writing = pool.submit(write_for_ever, pipe)
            stranger.close()
            with fail_after(20):
                info = await job.wait()
            assert writing.result(at_most(20)) >= info.log_end - 100 > 0
    assert (info.end_reason, info.exit_code) == ("exited", 0)


def write_for_ever(pipe: int) -> int:
    """Until nobody can read it any more; how many bytes were taken."""
    written = 0
    with os.fdopen(pipe, "wb", buffering=0) as file, contextlib.suppress(BrokenPipeError):
        while True:
            written += file.write(b"x" * 4096)
    return written
