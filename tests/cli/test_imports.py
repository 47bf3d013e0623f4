"""What the SDK and the CLI load: nothing of the server or of Linux, and no more than a command needs."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded(code: str) -> set[str]:
    """The modules that a new interpreter has loaded after this code."""
    script = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


def below(modules: set[str], *names: str) -> set[str]:
    return {module for module in modules if any(module == name or module.startswith(f"{name}.") for name in names)}


@pytest.mark.parametrize("name", ["jobrunner.client", "jobrunner_cli.main", "jobrunner_cli.follow"])
def test_client_and_cli_load_nothing_of_linux_or_the_server(name: str) -> None:
    modules = loaded(f"import {name}")
    assert name in modules
    assert not below(modules, "jobrunner.linux", "jobrunner.shim", "jobrunner.runner", "jobrunner.server", "jobrunner.log")
    assert not below(modules, "termios", "pwd", "resource")


def test_help_loads_neither_the_sdk_nor_pydantic() -> None:
    modules = loaded("from jobrunner_cli.main import run\nassert run(['start', '--help']) == 0")
    assert "typer" in modules
    assert not below(modules, "grpclib", "betterproto2", "anyio", "pydantic", "rich")


def test_a_command_that_asks_the_server_loads_no_pydantic() -> None:
    words = ["--address=127.0.0.1:1", "--ca=/x", "--cert=/x", "--key=/x", "ls"]
    code = f"from jobrunner_cli.main import run\nassert run({words}) == 78"
    modules = loaded(code)
    assert "jobrunner.client" in modules
    assert not below(modules, "pydantic.main", "pydantic_core", "rich")
