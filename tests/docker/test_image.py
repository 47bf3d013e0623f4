"""The image: what is in it, and what is not."""

from __future__ import annotations

import json

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


def test_a_container_that_may_not_mount_says_what_it_needs(stack: Stack) -> None:
    done = stack.docker("run", "--rm", "--network", "none", stack.image, check=False)
    assert done.code == 3
    assert "entrypoint: cannot make /sys/fs/cgroup" in done.err
    assert "needs --cap-add SYS_ADMIN and --security-opt apparmor=unconfined" in done.err


def test_other_commands_run_without_privileges(stack: Stack) -> None:
    done = stack.docker("run", "--rm", "--network", "none", "--cap-drop", "ALL", stack.image, "jobrunner", "--version")
    assert done.out.startswith("jobrunner ")
