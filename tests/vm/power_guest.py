"""In the virtual machine of power.sh: see that what was told before the power failed is there, then work until it fails again.

/dev/vdd has what this program told on /dev/ttyS1 when it ran before, by line; what had not come through by then is not in it. A
thing is told only once the server has answered it.

    started ID REQUEST CODE    a start was answered; CODE is what it will exit with, 0 if it runs until it is stopped
    ended ID                   it was told as ended by itself
    stopped ID                 a stop was answered
    removing ID, removed ID    before and after its removal
"""

from __future__ import annotations

import os
import random
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from jobrunner import JobSpec
from jobrunner.client import JobClient
from jobrunner.errors import JobNotFound
from jobrunner.job import Gap, JobInfo
from tests.support.crash import assert_exactly
from tests.support.daemon import ServerProcess

DISK = Path("/power")
HERE = Path("/run/power")
"""Certificates, which are new at each boot."""
USERS = 3


@dataclass(slots=True)
class Told:
    """What was told before, by id."""

    started: dict[str, tuple[str, int]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    stopped: set[str] = field(default_factory=set)
    removing: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)


def read_told(text: str) -> Told:
    told = Told()
    for line in text.splitlines():
        match line.split():
            case ["started", job_id, request, code]:
                told.started[job_id] = (request, int(code))
            case [("ended" | "stopped" | "removing" | "removed") as word, job_id]:
                getattr(told, word).add(job_id)
    return told


def spec_of(request: str, code: int) -> JobSpec:
    last = f"sleep 0.2; echo end; exit {code}" if code else "exec sleep 1000"
    return JobSpec("sh", ("-c", f"echo begin; {last}"), request_id=request)


async def checked(client: JobClient, told: Told) -> str:
    """Every record is right, no byte is claimed that is not there, request ids hold. What was found, in words."""
    infos = {info.job_id: await client.get(info.job_id).wait() for info in await client.list()}
    lost = 0
    for job_id, (request, code) in told.started.items():
        again = spec_of(request, code)
        if job_id in told.removed:
            assert job_id not in infos, f"{job_id} was removed, and is there"
        assert job_id in infos or job_id in told.removing, f"{job_id} was started, and is gone"
        assert (await client.start(again)).job_id == job_id, f"{request} was started twice"
        if job_id not in infos:
            continue
        await whole(client, infos[job_id], code, job_id in told.ended, job_id in told.stopped)
        lost += infos[job_id].end_reason == "lost"
    for job_id in infos.keys() - told.started.keys():  # started, and the answer had not come through
        assert infos[job_id].end_reason in ("exited", "stopped", "lost")
    await anyio.to_thread.run_sync(assert_exactly, DISK / "state", [], list(infos))
    return f"{len(told.started)} told as started, {len(told.removed)} as removed, {len(infos)} there, of which {lost} lost"


async def whole(client: JobClient, info: JobInfo, code: int, ended: bool, stopped: bool) -> None:
    """How it ended is what was told, or lost; its output is the beginning of what it wrote, all of it where it ended by itself."""
    told = (str(info.end_reason), info.exit_code)
    right = (
        [("exited", code)] if ended else [("stopped", None)] if stopped else [("lost", None), ("exited", code), ("stopped", None)]
    )
    assert told in right, (info.job_id, told, right)
    parts = []
    async with client.get(info.job_id).log() as reader:
        async for part in reader:
            if isinstance(part, Gap):
                assert (told[0], part.reason) == ("lost", "lost"), (part, info, evidence(info.job_id))
            parts.append(part)
    data = b"".join(part.data for part in parts if not isinstance(part, Gap))
    # What the disk had made room for, and had not got, are zeros: that may be where nothing was synced.
    assert b"begin\nend\n".startswith(data.rstrip(b"\0") if told[0] == "lost" else data), (info.job_id, data)
    assert not ended or (data, reader.offset, info.log_end) == (b"begin\nend\n", 10, 10), (info.job_id, data)


def evidence(job_id: str) -> dict[str, tuple[int, str]]:
    """Size and beginning of each file that a job has left."""
    directory = DISK / "state" / "jobs" / job_id
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): (path.stat().st_size, path.read_bytes()[:96].hex()) for path in files}


async def work(client: JobClient, choice: random.Random, tell: Callable[[str], None]) -> None:
    """Until the power fails."""
    while True:
        request, code = f"{choice.getrandbits(64):x}", choice.choice([0, 0, *range(1, 5)])
        job = await client.start(spec_of(request, code))
        tell(f"started {job.job_id} {request} {code}")
        if code:
            await job.wait()
            tell(f"ended {job.job_id}")
        elif choice.random() < 0.3:
            continue  # it runs on, and is lost
        else:
            await job.stop(grace=0)
            tell(f"stopped {job.job_id}")
        if choice.random() < 0.4:
            tell(f"removing {job.job_id}")
            try:
                await client.remove(job.job_id)
            except JobNotFound as exc:
                raise AssertionError("a job that has ended is not there") from exc
            tell(f"removed {job.job_id}")


async def main() -> None:
    for directory in (DISK, HERE):
        directory.mkdir()
    await anyio.run_process(["mount", "/dev/vdc", str(DISK)])
    (HERE / "state").symlink_to(DISK / "state")
    told = read_told(Path("/dev/vdd").read_bytes().rstrip(b"\0").decode())
    line = os.open("/dev/ttyS1", os.O_WRONLY | os.O_NOCTTY)
    begun = time.monotonic()
    server = ServerProcess(HERE, patience=200)

    def tell(text: str) -> None:
        os.write(line, f"{text}\n".encode())
        termios.tcdrain(line)  # it is on the host before anything else is done

    files = server.files()
    async with JobClient(server.address, **files, timeout=300) as client:  # type: ignore[arg-type]
        tell(f"right {await checked(client, told)}; {time.monotonic() - begun:.0f} s since the server's exec")
        async with anyio.create_task_group() as tasks:
            for number in range(USERS):
                tasks.start_soon(work, client, random.Random(f"{number} {len(told.started)}"), tell)


if __name__ == "__main__":
    try:
        anyio.run(main)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # on the console
        sys.exit(1)
