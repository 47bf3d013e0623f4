"""The unmodified server, killed at the n-th write, fsync, rename, mkdir, unlink and clone of a start, a stop, an end and a removal.

After each kill it is started again, and then: every job was started once, its output and exit code are right, a stop was carried
out, and what is on the host is exactly what the jobs that exist should have. JOBRUNNER_CRASH_ROUNDS says how many kills there are.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from jobrunner.client import ClientJob, JobClient
from jobrunner.errors import JobNotFound, Unavailable
from jobrunner.job import JobInfo
from jobrunner.output import Chunk
from tests.support.crash import CALLS, Killer, assert_exactly, is_dead
from tests.support.daemon import ServerProcess
from tests.support.timing import at_most, fail_after

ROUNDS = int(os.environ.get("JOBRUNNER_CRASH_ROUNDS", "30"))
pytestmark = [pytest.mark.requires("root", "command:strace"), pytest.mark.timeout(60 + 10 * ROUNDS)]

ACTIONS = ("start", "stop", "end", "remove")
FOREVER = ("sh", "-c", "trap 'echo stopped; exit 5' TERM; echo started; while :; do sleep 0.05; done")


class Rounds:
    """One state directory, over many servers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.server = ServerProcess(path)
        self.kills = 0
        self.tries = 0

    @asynccontextmanager
    async def client(self, resume: float = 0.0) -> AsyncIterator[JobClient]:
        files = self.server.files()
        async with JobClient(self.server.address, **files, resume_timeout=resume) as client:  # type: ignore[arg-type]
            yield client

    async def restarted(self) -> None:
        await anyio.to_thread.run_sync(self.server.end)  # it is dead, or is to be: what is left is its pipe
        self.server = await anyio.to_thread.run_sync(ServerProcess, self.path)

    async def killed_at(self, call: str, number: int, action: str, job: ClientJob | None) -> bool:
        """Do this while the server dies at the n-th such call; False if it lived."""
        async with self.client() as client:
            await client.server()
            killer = await anyio.to_thread.run_sync(Killer, self.server.process.pid, CALLS[call], number)
            try:
                with fail_after(30):
                    await self.act(client, action, job)
                dead = await anyio.to_thread.run_sync(is_dead, self.server, 0.2)
            except Unavailable:
                dead = await anyio.to_thread.run_sync(is_dead, self.server, at_most(10))
                assert dead, "the server went silent, and lives"
            finally:
                await anyio.to_thread.run_sync(killer.release)
        self.kills += dead
        return dead

    async def act(self, client: JobClient, action: str, job: ClientJob | None) -> None:
        match action:
            case "start":
                await client.start(*FOREVER, request_id=f"request-{self.tries}")
            case "stop":
                assert job is not None
                await client.get(job.job_id).stop()
            case "end":
                assert job is not None
                await client.get(job.job_id).wait()
            case "remove":
                assert job is not None
                await client.remove(job.job_id)


async def output_of(job: ClientJob) -> bytes:
    async with job.log() as reader:
        return b"".join([part.data async for part in reader if isinstance(part, Chunk)])


async def prepared(client: JobClient, action: str) -> ClientJob | None:
    """The job that the action is about."""
    if action == "start":
        return None
    if action == "end":
        return await client.start("sh", "-c", "echo started; sleep 0.7; echo ended; exit 7")
    job = await client.start(*FOREVER)
    async with job.log() as reader:
        assert await reader.next_line()
    if action == "remove":
        await job.stop()
    return job


async def checked(rounds: Rounds, client: JobClient, action: str, job: ClientJob | None, request: str) -> None:
    """What the action was about is as if the server had not died, or can be asked for again."""
    if action == "start":
        job = await client.start(*FOREVER, request_id=request)
        assert [info.job_id for info in await client.list()] == [job.job_id]
        async with job.log() as reader:
            assert await reader.next_line()
        await anyio.to_thread.run_sync(assert_exactly, rounds.server.state, [job.job_id], [])
    assert job is not None
    info: JobInfo | None
    if action == "end":
        info = await job.wait()
        assert (info.end_reason, info.exit_code, await output_of(job)) == ("exited", 7, b"started\nended\n")
    else:
        try:
            info = await job.stop()
        except JobNotFound:
            assert action == "remove"
            info = None
        if info is not None:
            assert (info.end_reason, info.exit_code, info.stopped_by) == ("stopped", 5, "admin")
            assert await output_of(job) == b"started\nstopped\n"
    await anyio.to_thread.run_sync(assert_exactly, rounds.server.state, [], [] if info is None else [job.job_id])
    if info is not None:
        await client.remove(job.job_id)
    await anyio.to_thread.run_sync(assert_exactly, rounds.server.state, [], [])


async def test_a_server_killed_at_any_durable_step_loses_nothing(tmp_path: Path) -> None:
    choice = random.Random(os.environ.get("JOBRUNNER_CRASH_SEED", "jobrunner"))
    waiting = {(action, call): 1 for action in ACTIONS for call in CALLS}
    rounds = Rounds(tmp_path)
    try:
        while rounds.kills < ROUNDS:
            if not waiting:  # every one was reached; again, at other moments
                waiting = {(action, call): 1 for action in ACTIONS for call in CALLS}
            action, call = choice.choice(sorted(waiting))
            rounds.tries += 1
            request = f"request-{rounds.tries}"
            async with rounds.client() as client:
                job = await prepared(client, action)
            if await rounds.killed_at(call, waiting[action, call], action, job):
                waiting[action, call] += 1
                await rounds.restarted()
            else:
                del waiting[action, call]  # this action has no more such calls
            with fail_after(40):
                async with rounds.client() as client:
                    again = None if job is None else client.get(job.job_id)
                    await checked(rounds, client, action, again, request)
    finally:
        await anyio.to_thread.run_sync(rounds.server.end, signal.SIGTERM)
    print(f"{rounds.kills} kills; still to come: {sorted(waiting.items())}")


async def test_a_server_killed_at_any_moment_under_load_loses_nothing(tmp_path: Path) -> None:
    choice = random.Random(os.environ.get("JOBRUNNER_CRASH_SEED", "load"))
    rounds = Rounds(tmp_path)
    listen = rounds.server.address
    script = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo line $i; sleep 0.02; done; exit {}"
    lines = b"".join(b"line %d\n" % number for number in range(1, 41))
    done: list[int] = []
    enough = anyio.Event()

    async def one(number: int) -> None:
        async with rounds.client(resume=60) as client:
            await client.server()
            while not enough.is_set():
                code = choice.randrange(256)
                job = await client.start("sh", "-c", script.format(code))
                if choice.random() < 0.3:
                    info = await job.stop(grace=0)
                    assert info.end_reason in ("stopped", "exited")
                    assert lines.startswith(await output_of(job))
                else:
                    assert await output_of(job) == lines
                    assert (await job.wait()).exit_code == code
                done.append(number)

    try:
        with anyio.fail_after(at_most(40 + 4 * ROUNDS)):
            async with anyio.create_task_group() as tasks:
                for number in range(4):
                    tasks.start_soon(one, number)
                for _ in range(max(3, ROUNDS // 6)):
                    await anyio.sleep(choice.uniform(0.1, 1.2))
                    await anyio.to_thread.run_sync(rounds.server.end, signal.SIGKILL)
                    rounds.server = await anyio.to_thread.run_sync(lambda: ServerProcess(tmp_path, listen=listen))
                enough.set()
        async with rounds.client() as client:
            jobs = await client.list()
            assert len({job.job_id for job in jobs}) == len(jobs) == len(done)
        await anyio.to_thread.run_sync(assert_exactly, rounds.server.state, [], [job.job_id for job in jobs])
    finally:
        await anyio.to_thread.run_sync(rounds.server.end)
