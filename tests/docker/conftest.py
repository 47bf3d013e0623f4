"""The stack of docker-compose.yml, once for all tests of this directory; `scripts/test_docker.sh` has built its image."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docker.stack import PUBLISHED, Cli, Stack


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Up, with a healthy server; taken down with its volumes."""
    running = Stack()
    try:
        running.compose("up", "-d", "--no-build")
        running.compose("run", "--rm", "client", "ls")  # waits until the server is healthy
        yield running
    finally:
        running.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")


@pytest.fixture(scope="session")
def cli(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """The host's own CLI, with the certificate that docs/container.md takes out."""
    where = tmp_path_factory.mktemp("host")
    said = stack.recipe("From the host", where, {PUBLISHED: stack.address}).out
    assert said == "Hello World\n"
    return Cli(stack.address, where / "certs")
