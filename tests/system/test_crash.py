"""The unmodified server, killed at the n-th write, fsync, rename, mkdir, unlink, clone, chown of a start, stop, end and removal.

After each kill it is started again, and then: every job was started once, its output and exit code are right, a stop was carried
out, and what is on the host is exactly what the jobs that exist should have. JOBRUNNER_CRASH_ROUNDS says how many kills there are.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from jobrunner.client import ClientJob, JobClient
from jobrunner.errors import JobNotFound, Unavailable
from jobrunner.job import JobInfo, JobSpec
from jobrunner.output import Chunk
from tests.support.crash import CALLS, Killer, assert_exactly, is_dead, open_files
from tests.support.daemon import ServerProcess
from tests.support.shim import link_of, read_proc
from tests.support.timing import at_most, fail_after

ROUNDS = int(os.environ.get("JOBRUNNER_CRASH_ROUNDS", "30"))
pytestmark = [pytest.mark.requires("root", "command:strace"), pytest.mark.timeout(60 + 10 * ROUNDS)]

ACTIONS = ("start", "stop", "end", "remove")
MARK = "echo $REQUEST >>/volumes/starts/all; mkdir /work/d; echo >/work/d/f; "
FOREVER = ("sh", "-c", f"{MARK}trap 'echo stopped; exit 5' TERM; echo started; while :; do sleep 0.05; done")


class Rounds:
    """One state directory, over many servers. Each job adds its request to a file of a volume's, which no record can undo."""

    def __init__(self, path: Path, listen: str = "127.0.0.1:0") -> None:
        self.path = path
        self.listen = listen
        self.starts = path / "starts"
        self.starts.mkdir()
        os.chown(self.starts, 1000, 1000)
        (path / "settings.toml").write_text(f'[volumes]\nstarts = {{path = "{self.starts}"}}\n')
        self.server = self.serve()
        self.files: list[str] = []
        self.kills = 0
        self.tries = 0

    def serve(self) -> ServerProcess:
        return ServerProcess(self.path, f"--config={self.path}/settings.toml", listen=self.listen)

    def spec(self, request: str, *command: str) -> JobSpec:
        return JobSpec(command[0], command[1:], env={"REQUEST": request}, request_id=request, volumes=("starts",))

    def started(self) -> list[str]:
        """The requests of all jobs whose command ever ran, in their order."""
        file = self.starts / "all"
        return file.read_text().splitlines() if file.exists() else []

    @asynccontextmanager
    async def client(self, resume: float = 0.0) -> AsyncIterator[JobClient]:
        files = self.server.files()
        async with JobClient(self.server.address, **files, resume_timeout=resume) as client:  # type: ignore[arg-type]
            yield client

    async def restarted(self) -> None:
        await anyio.to_thread.run_sync(self.server.end)  # it is dead, or is to be: what is left is its pipe
        self.server = await anyio.to_thread.run_sync(self.serve)

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
                await client.start(self.spec(f"request-{self.tries}", *FOREVER))
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


async def prepared(rounds: Rounds, client: JobClient, action: str) -> ClientJob | None:
    """The job that the action is about."""
    if action == "start":
        return None
    request = f"prepared-{rounds.tries}"
    if action == "end":
        return await client.start(rounds.spec(request, "sh", "-c", f"{MARK}echo started; sleep 0.7; echo ended; exit 7"))
    job = await client.start(rounds.spec(request, *FOREVER))
    async with job.log() as reader:
        assert await reader.next_line()
    if action == "remove":
        await job.stop()
    return job


async def checked(rounds: Rounds, client: JobClient, action: str, job: ClientJob | None, request: str) -> None:
    """What the action was about is as if the server had not died, or can be asked for again."""
    if action == "start":
        job = await client.start(rounds.spec(request, *FOREVER))
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
    rounds.files = rounds.files or open_files(rounds.server.process.pid)
    assert open_files(rounds.server.process.pid) == rounds.files


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
                job = await prepared(rounds, client, action)
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
    assert sorted(rounds.started()) == sorted(set(rounds.started())), "a job was started twice"
    assert len(rounds.started()) == rounds.tries
    print(f"{rounds.kills} kills; still to come: {sorted(waiting.items())}")


async def test_a_server_killed_at_any_moment_under_load_loses_nothing(tmp_path: Path) -> None:
    choice = random.Random(os.environ.get("JOBRUNNER_CRASH_SEED", "load"))
    rounds = Rounds(tmp_path)
    rounds.listen = rounds.server.address
    script = f"{MARK}i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo line $i; sleep 0.02; done; exit $CODE"
    lines = b"".join(b"line %d\n" % number for number in range(1, 41))
    done: list[int] = []
    stopped = 0
    enough = anyio.Event()

    async def one(number: int) -> None:
        nonlocal stopped
        async with rounds.client(resume=60) as client:
            await client.server()
            while not enough.is_set():
                code = choice.randrange(256)
                env = {"REQUEST": f"{number}-{len(done)}", "CODE": str(code)}
                job = await client.start("sh", "-c", script, env=env, volumes=["starts"])
                if choice.random() < 0.3:
                    stopped += 1
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
                    rounds.server = await anyio.to_thread.run_sync(rounds.serve)
                enough.set()
        async with rounds.client() as client:
            jobs = await client.list()
            assert len({job.job_id for job in jobs}) == len(jobs) == len(done)
        assert sorted(rounds.started()) == sorted(set(rounds.started())), "a job was started twice"
        assert (
            len(done) - stopped <= len(rounds.started()) <= len(done)
        )  # one that is stopped at once may not come to its first word
        await anyio.to_thread.run_sync(assert_exactly, rounds.server.state, [], [job.job_id for job in jobs])
    finally:
        await anyio.to_thread.run_sync(rounds.server.end)


async def test_shims_and_inits_killed_at_any_moment_end_their_job_at_once_and_nothing_is_left(tmp_path: Path) -> None:
    """With a server, and every other time without one; told as lost, or by its own end if it was first."""
    choice = random.Random(os.environ.get("JOBRUNNER_CRASH_SEED", "helpers"))
    rounds = Rounds(tmp_path)
    told: Counter[str] = Counter()
    try:
        for number in range(max(10, ROUNDS // 3)):
            away = number % 2 == 1
            async with rounds.client(resume=60) as client:
                script = f"{MARK}echo started; (sleep 1000 &); sleep {choice.uniform(0, 0.05):.3f}; exit 7"
                job = await client.start(rounds.spec(f"{number}", "sh", "-c", script))
                shim, init = await anyio.to_thread.run_sync(helpers_of, rounds.server.state, job.job_id)
                if away:
                    await anyio.to_thread.run_sync(rounds.server.end, signal.SIGKILL)
                await anyio.sleep(choice.uniform(0, 0.06))
                if victims := [pid for pid in (shim, init) if pid]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(choice.choice(victims), signal.SIGKILL)
            if away:
                rounds.server = await anyio.to_thread.run_sync(rounds.serve)
            async with rounds.client() as client:
                with fail_after(10):
                    info = await client.get(job.job_id).wait()
                assert (str(info.end_reason), info.exit_code) in [("lost", None), ("exited", 7)]
                assert b"started\n".startswith(await output_of(client.get(job.job_id)))
                told[str(info.end_reason)] += 1
                await anyio.to_thread.run_sync(assert_exactly, rounds.server.state, [], [job.job_id])
                await client.remove(job.job_id)
    finally:
        await anyio.to_thread.run_sync(rounds.server.end)
    assert len(rounds.started()) == len(set(rounds.started()))
    print(f"told as {dict(told)}")


def helpers_of(state: Path, job_id: str) -> tuple[int, int]:
    """The pids of a job's shim and init; 0 for one that has left already."""
    where = str(state.resolve() / "jobs" / job_id)
    shim = next((int(name) for name in os.listdir("/proc") if name.isdigit() and link_of(int(name), "cwd") == where), 0)
    children = read_proc(shim, f"task/{shim}/children").split() if shim else []
    return shim, int(children[0]) if children else 0
