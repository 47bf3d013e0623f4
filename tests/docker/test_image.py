"""The image: what is in it, and what is not."""

from __future__ import annotations

import json
import re

import pytest

from tests.docker.stack import Stack


def in_image(stack: Stack, script: str) -> str:
    return stack.docker("run", "--rm", "--network", "none", "--entrypoint", "sh", stack.image, "-c", script).out


def test_it_is_small(stack: Stack) -> None:
    size = json.loads(stack.docker("image", "inspect", stack.image).out)[0]["Size"]
    assert size < 200_000_000


def test_it_has_no_compiler_no_pip_and_no_build_secret(stack: Stack) -> None:
    script = "command -v cc gcc pip; python3 -c 'import pip' 2>/dev/null && echo pip; cat /etc/pip.conf 2>/dev/null; true"
    assert in_image(stack, script) == ""


def test_the_shim_in_it_is_static(stack: Stack) -> None:
    script = 'ldd "$(python3 -c "from jobrunner.shim import binary_path; print(binary_path())")" 2>&1; true'
    assert in_image(stack, script).strip() in ("statically linked", "not a dynamic executable")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "NET_ADMIN",
            r"entrypoint: cannot make /sys/fs/cgroup\S* writable: needs --cap-add SYS_ADMIN and --security-opt apparmor=.*",
        ),
        (
            "SYS_ADMIN",
            r"jobrunnerd: cannot run jobs: capabilities: CAP_NET_ADMIN and .* not there; docker, podman: --cap-add NET_ADMIN .*",
        ),
    ],
)
def test_without_one_of_its_capabilities_it_says_which_in_one_line(stack: Stack, given: str, said: str) -> None:
    (certs,) = (mount["Name"] for mount in stack.inspect(stack.container())["Mounts"] if mount["Destination"] == "/certs")
    rights = ("--cap-drop", "ALL", "--cap-add", given)
    done = stack.docker("run", "--rm", "--network", "none", *rights, "-v", f"{certs}:/certs:ro", stack.image, check=False)
    assert done.code == 3
    assert re.fullmatch(said, done.err.strip())


def test_other_commands_run_without_privileges(stack: Stack) -> None:
    done = stack.docker("run", "--rm", "--network", "none", "--cap-drop", "ALL", stack.image, "jobrunner", "--version")
    assert done.out.startswith("jobrunner ")
