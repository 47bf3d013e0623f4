"""Any prefix of the durable writes of a job's life leads to the state that the table in docs/formats.md says.

The writes are replayed from a life that really happened: directories, files and their last contents, in the order of the table. The
prefix ends within a file's bytes, too.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobrunner import JobSpec
from jobrunner.job import Gap
from jobrunner.runner import JobRunner
from jobrunner.shim.exitrecord import LAYOUT, State, parse_exit
from tests.support.crash import state_of
from tests.support.runner import open_runner, run, shell

pytestmark = [pytest.mark.requires("root"), pytest.mark.timeout(240)]

OUT = b"one\ntwo\n"
REQUEST = "request"
SPEC = shell("echo one; sleep 0.05; echo two; exit 3", request_id=REQUEST)


@dataclass(frozen=True, slots=True)
class Life:
    """What a job that ran to its end has left, by name below the state directory; and how it is told."""

    job_id: str
    files: dict[str, bytes]

    def steps(self, files_left: bool) -> list[tuple[str, str, bytes]]:
        """The durable writes in their order: what is done, to what, and the bytes. The job has left files in `work`, or none."""
        job = f"jobs/{self.job_id}"
        ended = self.files[f"{job}/exit"]
        (segment,) = (name for name in self.files if len(Path(name).name) == 16)
        return [
            ("mkdir", job, b""),
            ("mkdir", f"{job}/log", b""),
            ("write", f"running/{self.job_id}", b""),
            ("write", f"{job}/.job.json.new", self.files[f"{job}/job.json"]),
            ("rename", f"{job}/job.json", b""),
            ("fifo", f"{job}/ctl", b""),
            ("whole", f"{job}/exit", running(ended)),
            ("write", segment, self.files[segment]),
            ("write", f"{segment}.idx", self.files[f"{segment}.idx"]),
            ("whole", f"{job}/exit", ended),
            ("leave" if files_left else "mkdir", f"running/{self.job_id}" if files_left else f"{job}/work", b""),
            ("unlink", f"{'leaving' if files_left else 'running'}/{self.job_id}", b""),
            ("rename", f"removed/{self.job_id}", b""),
        ]


def running(ended: bytes) -> bytes:
    """The record as it was when the job began: what a reader takes of it is the state and the start."""
    import zlib

    values = list(LAYOUT.unpack(ended))
    values[2:5] = [State.RUNNING, 0, -1]
    body = LAYOUT.pack(*values)[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def replay(state: Path, life: Life, files_left: bool, count: int, part: float) -> None:
    """The first `count` writes, and of the next one this part of its bytes."""
    for number, (kind, name, data) in enumerate(life.steps(files_left)[: count + 1]):
        path = state / name
        whole = number < count
        if not whole and kind != "write":
            break
        match kind:
            case "mkdir":
                path.mkdir()
            case "fifo":
                os.mkfifo(path)
            case "unlink":
                path.unlink()
            case "leave":
                path.rename(state / "leaving" / life.job_id)
            case "rename" if path.name == "job.json":
                path.with_name(".job.json.new").rename(path)
            case "rename":
                (state / "jobs" / life.job_id).rename(path)
            case _:
                path.write_bytes(data if whole else data[: int(len(data) * part)])


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    import asyncio

    path = tmp_path_factory.mktemp("life")

    async def live() -> str:
        async with open_runner(path) as runner:
            return (await run(runner, SPEC)).job_id

    job_id = asyncio.run(live())
    state = path / "state"
    files = {str(file.relative_to(state)): file.read_bytes() for file in (state / "jobs").rglob("*") if file.is_file()}
    assert parse_exit(files[f"jobs/{job_id}/exit"]) is not None
    return Life(job_id, files)


async def told(runner: JobRunner, job_id: str) -> tuple[str, int | None, bytes]:
    job = await runner.get(job_id)
    info = await job.wait()
    async with job.log() as reader:
        parts = [part async for part in reader]
    return str(info.end_reason), info.exit_code, b"".join(part.data for part in parts if not isinstance(part, Gap))


@settings(max_examples=35, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files_left=st.booleans(), count=st.integers(0, 13), part=st.floats(0, 1))
def test_any_prefix_is_explained_by_the_rules(life: Life, files_left: bool, count: int, part: float) -> None:
    import asyncio

    path = Path(tempfile.mkdtemp(prefix="prefix-"))
    try:
        asyncio.run(check(path, life, files_left, count, part))
    finally:
        shutil.rmtree(path)


async def check(path: Path, life: Life, files_left: bool, count: int, part: float) -> None:
    async with open_runner(path):
        pass
    state = path / "state"
    replay(state, life, files_left, count, part)
    for _ in range(2):  # once more: what was found is now what is there
        async with open_runner(path) as runner:
            jobs = [job.job_id for job in await runner.list()]
            if count < 7 or count > 12:  # rows 2 to 5, and 12: nothing was executed, or it is removed
                assert jobs == []
            else:
                assert jobs == [life.job_id]
                reason, code, out = await told(runner, life.job_id)
                assert (reason, code) == (("lost", None) if count < 10 else ("exited", 3))  # row 6, rows 9 to 11
                assert OUT.startswith(out) and (count < 9 or out == OUT)  # row 7
                again = await runner.start(SPEC)
                assert again.job_id == life.job_id
        kept = jobs
        assert state_of(state) == {name: [] for name in state_of(state)} | {"records": kept}


def test_the_table_names_every_file(life: Life) -> None:
    formats = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    for word in ("job.json", "ctl", "exit", "running/<id>", "leaving/<id>", "removed/<id>", "requests", "stop"):
        assert f"`{word}`" in formats
    assert JobSpec(SPEC.command, SPEC.args).request_id == ""
