"""A line of 100 MiB takes 100 MiB nowhere: not in the server, not in the SDK, not in the command line with its stamps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from jobrunner.output import MAX_LINE
from tests.support.cli import jobrunner, start, wait

if TYPE_CHECKING:
    from tests.support.daemon import ServerProcess

pytestmark = pytest.mark.requires("root")

MIB = 1 << 20
LINE = 100 * MIB
SLACK = 24 * MIB
"""What a process may take more for the long line than for a short one: what is on its way, and what the allocator keeps."""

SDK = """
import asyncio, sys
from jobrunner.client import JobClient
async def main():
    sizes = []
    async with JobClient.from_env() as client, client.get(sys.argv[1]).log() as reader:
        while (line := await reader.next_line()) is not None:
            sizes.append((len(line.data), line.continues))
    print(sum(size for size, _ in sizes), max(sizes)[0], sum(not more for _, more in sizes))
asyncio.run(main())
"""


def peak(server: ServerProcess, *command: str) -> tuple[bytes, int]:
    """What a process writes to stdout, and the most memory that it has had, in bytes (getrusage(2))."""
    process = subprocess.Popen(command, env=server.environ(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    out, size = b"", 0
    while data := os.read(process.stdout.fileno(), MIB):
        size += len(data)
        out = (out + data)[:100]
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return out + b" %d" % size, usage.ru_maxrss * 1024


def rss(server: ServerProcess) -> int:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(180)
def test_a_line_of_100_mib_takes_100_mib_nowhere(server: ServerProcess) -> None:
    short, long = (start(server, "head", "-c", str(size), "/dev/zero") for size in (MIB, LINE))
    for job_id in (short, long):
        wait(server, job_id)
    sdk = (sys.executable, "-c", SDK)
    stamped = (str(Path(sys.executable).with_name("jobrunner")), "log", "-t")
    least = [peak(server, *command, short)[1] for command in (sdk, stamped)]
    before = rss(server)
    (said, by_sdk), (_, by_cli) = (peak(server, *command, long) for command in (sdk, stamped))
    assert said.split()[:3] == [b"%d" % LINE, b"%d" % MAX_LINE, b"1"]
    assert rss(server) - before < SLACK
    assert by_sdk - least[0] < SLACK
    assert by_cli - least[1] < SLACK
    jobrunner(server, "rm", short, long)
