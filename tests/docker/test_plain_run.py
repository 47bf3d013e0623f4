"""The image by `docker run` alone, as docs/container.md has it, with tini for pid 1 and with Docker's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.stack import PUBLISHED, Cli, Stack, free_address, run

NAME = "jobrunner-test-plain"
VOLUMES = tuple(f"{NAME}-{kind}" for kind in ("ca", "server", "client", "state"))


@pytest.fixture(params=["tini", "docker-init"])
def plain(stack: Stack, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cli]:
    """A server without compose; the CLI for it."""
    address = free_address()
    changes = {"--name jobrunnerd": f"--name {NAME}", "-v jobrunner-": f"-v {NAME}-", PUBLISHED: address}
    # The stack's network, because a daemon without a default bridge has no other that ports are published from.
    init = "--init " if request.param == "docker-init" else ""
    changes["--detach"] = f"--detach {init}--network {stack.network}"
    try:
        stack.recipe("Without compose", tmp_path, changes)
        stack.wait_until_it_listens(NAME)
        take = ("-v", f"{VOLUMES[2]}:/certs", "-v", f"{tmp_path}:/out", "--entrypoint", "cp", stack.image, "-r", "/certs/.", "/out")
        stack.docker("run", "--rm", "--network", "none", *take)
        assert stack.docker("exec", NAME, "cat", "/proc/1/comm").out.strip() == request.param
        yield Cli(address, tmp_path)
    finally:
        stack.docker("rm", "--force", NAME, check=False)
        stack.docker("volume", "rm", *VOLUMES, check=False)


def test_it_runs_jobs_and_reaps_their_shims(stack: Stack, plain: Cli) -> None:
    for _ in range(3):
        assert plain("run", "--", "echo", "Hello World").out == "Hello World\n"
    assert stack.docker("exec", NAME, "sh", "-c", "cat /proc/[0-9]*/stat | grep ') Z ' || true").out == ""


def test_nothing_is_left_on_the_host_when_it_is_killed_with_a_job(stack: Stack, plain: Cli) -> None:
    job_id = plain.start("sh", "-c", "setsid sleep 1000 & exec sleep 1000")
    container = stack.inspect(NAME)["Id"]
    find = [
        "sh",
        "-c",
        f"find /sys/fs/cgroup -name '*{container}*' -o -name {job_id}; grep -l {container} /proc/[0-9]*/cgroup 2>&-; true",
    ]
    assert job_id in run(find).out
    stack.docker("rm", "--force", NAME)
    assert run(find).out == ""
    assert container not in Path("/proc/self/mountinfo").read_text()
