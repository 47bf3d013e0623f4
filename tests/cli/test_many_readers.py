"""Sixteen processes join one job at random times over mutual TLS: each has every byte, once and in order."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.cli import jobrunner, popen, start

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.daemon import ServerProcess

pytestmark = pytest.mark.requires("root")

LINES = 1_000_000
RANDOM = 64 << 20
READERS = 16

JOB = f"""
import hashlib, os, sys
seen = hashlib.sha256()
def put(data):
    seen.update(data)
    sys.stdout.buffer.write(data)
for first in range(0, {LINES}, 1000):
    put(b"".join(b"line %d\\n" % number for number in range(first, first + 1000)))
for _ in range({RANDOM >> 20}):
    put(os.urandom(1 << 20))
sys.stdout.buffer.flush()
print(seen.hexdigest(), file=sys.stderr)
"""

SDK = """
import asyncio, hashlib, json, sys
from jobrunner import Stream
from jobrunner.client import JobClient
async def main():
    seen = hashlib.sha256()
    said = b""
    async with JobClient.from_env() as client, client.get(sys.argv[1]).log() as reader:
        async for part in reader:
            if part.stream is Stream.STDOUT:
                seen.update(part.data)
            else:
                said += part.data
        print(json.dumps([seen.hexdigest(), said.decode(), reader.end.total_bytes]))
asyncio.run(main())
"""


def sdk_process(server: ServerProcess, job_id: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SDK, job_id], env=server.environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.timeout(300)
def test_sixteen_readers_that_join_at_random_times_have_every_byte(server: ServerProcess, tmp_path: Path) -> None:
    pauses = random.Random(16)
    job_id = start(server, "--cpus", "2", "--", "python3", "-c", JOB)
    files = [tmp_path / f"cli-{number}" for number in range(READERS // 2)]
    cli, sdk = [], []
    for file in files:
        with file.open("wb") as target:
            cli.append(popen(server, "log", "-f", job_id, stdout=target.fileno()))
        sdk.append(sdk_process(server, job_id))
        time.sleep(pauses.uniform(0, 0.4))  # The random moments at which readers join are what is tested.
    said = [process.communicate(timeout=240) for process in (*cli, *sdk)]
    assert [process.returncode for process in (*cli, *sdk)] == [0] * READERS, said
    expected = said[0][1].decode().strip()
    assert len(expected) == 64
    assert {err.decode().strip() for _, err in said[: len(cli)]} == {expected}
    for file in files:
        with file.open("rb") as data:
            assert hashlib.file_digest(data, "sha256").hexdigest() == expected
    log_end = json.loads(jobrunner(server, "info", "--json", job_id).out)["log_end"]
    for out, _ in said[len(cli) :]:
        assert json.loads(out) == [expected, f"{expected}\n", log_end]
