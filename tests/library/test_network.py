"""Which network a job gets: none, or the host's where the configuration allows it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from jobrunner import JobSpec
from jobrunner.errors import InvalidRequest
from tests.support.runner import open_runner, run_output

pytestmark = pytest.mark.requires("root")

CONNECT = "import socket, sys; print(socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5).recv(9).decode())"


def connecting_to(port: int, network: str) -> JobSpec:
    return JobSpec("python3", ("-c", CONNECT, str(port)), network=network)


@pytest.mark.parametrize("network", ["", "none"])
async def test_a_job_cannot_reach_what_listens_on_the_host(tmp_path: Path, network: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with open_runner(tmp_path, network_host=True) as runner:
            info, data = await run_output(runner, connecting_to(listener.getsockname()[1], network))
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert (info.status, info.network) == ("failed", "none")
    assert b"ConnectionRefusedError" in data


async def test_a_job_with_the_hosts_network_reaches_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with open_runner(tmp_path, network_host=True) as runner:
            job = await runner.start(connecting_to(listener.getsockname()[1], "host"))
            listener.settimeout(20)
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"reached")
            info = await job.wait()
            async with job.log() as reader:
                line = await reader.next_line()
    assert line is not None
    assert (info.status, info.network, line.data) == ("completed", "host", b"reached\n")


async def test_only_the_network_is_the_hosts(tmp_path: Path) -> None:
    kinds = ("net", "pid", "mnt", "ipc", "uts", "cgroup")
    spec = JobSpec("readlink", tuple(f"/proc/self/ns/{kind}" for kind in kinds), network="host")
    async with open_runner(tmp_path, network_host=True) as runner:
        _, data = await run_output(runner, spec)
    host = [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds]
    assert [own == other for own, other in zip(data.decode().split(), host, strict=True)] == [True, *[False] * 5]


async def test_the_hosts_network_is_refused_unless_the_configuration_allows_it(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        with pytest.raises(InvalidRequest, match="network_host = true") as caught:
            await runner.start(JobSpec("true", network="host"))
        assert await runner.list() == []
    assert caught.value.field == "network"


async def test_which_network_a_job_has_is_known_after_a_restart(tmp_path: Path) -> None:
    async with open_runner(tmp_path, network_host=True) as runner:
        info, _ = await run_output(runner, JobSpec("true", network="host"))
    async with open_runner(tmp_path) as runner:
        assert (await runner.get(info.job_id)).info().network == "host"
