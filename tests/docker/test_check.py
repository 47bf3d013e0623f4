"""`jobrunnerd check` in a container that lacks something: what it says to add is added, as it is said, and then it is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docker.stack import Stack

FLAG = re.compile(r"--(?:cap-add|security-opt|pids-limit|ulimit)[ =][\w=:/.-]+")


def check(stack: Stack, *flags: str) -> dict[str, Any]:
    """The findings of `docker run FLAGS IMAGE jobrunnerd check`, with the stack's certificates."""
    (certs,) = (mount["Name"] for mount in stack.inspect(stack.container())["Mounts"] if mount["Destination"] == "/certs")
    certificates = ("--network", "none", "-v", f"{certs}:/certs:ro")
    done = stack.docker("run", "--rm", *certificates, *flags, stack.image, "jobrunnerd", "check", "--json", check=False)
    assert done.err == ""
    found = {finding["name"]: finding for finding in json.loads(done.out)}
    assert done.code == 3 * any(finding["level"] == "missing" for finding in found.values())
    return found


def remedies(found: dict[str, Any], level: str) -> tuple[str, ...]:
    """The flags of `docker run` that the findings of this level name, each once."""
    texts = [part for finding in found.values() if finding["level"] == level for part in finding["remedy"].split("; ")]
    flags = [flag for text in texts if "docker" in text for flag in FLAG.findall(text)]
    return tuple(word for flag in dict.fromkeys(flags) for word in flag.split(" "))


def level(found: dict[str, Any], *names: str) -> set[str]:
    return {found[name]["level"] for name in names}


@pytest.fixture(scope="module")
def given(stack: Stack) -> tuple[str, ...]:
    """What a check in a container without any flags says to add."""
    found = check(stack)
    assert level(found, "capabilities", "cgroup", "namespace mount", "clone3") == {"missing"}
    assert found["job"]["what"] == "none was tried, because something is missing"
    return remedies(found, "missing")


def test_exactly_what_is_said_to_be_missing_is_enough(stack: Stack, given: tuple[str, ...]) -> None:
    assert sorted(given) == sorted([*["--cap-add"] * 2, "SYS_ADMIN", "NET_ADMIN", "--security-opt", "apparmor=unconfined"])
    found = check(stack, *given)
    assert [name for name, finding in found.items() if finding["level"] == "missing"] == []
    assert level(found, "job", "cgroup", "certificates") == {"ok"}


def test_narrow_bounds_are_told_and_the_remedies_help(stack: Stack, given: tuple[str, ...]) -> None:
    narrow = ("--pids-limit", "500", "--ulimit", "nofile=256")
    found = check(stack, *given, *narrow)
    assert level(found, "processes", "open files") == {"limited"}
    added = remedies({name: found[name] for name in ("processes", "open files")}, "limited")
    assert level(check(stack, *given, *added), "processes", "open files") == {"ok"}


def test_a_filter_that_denies_mounts_is_told_and_the_remedy_helps(stack: Stack, given: tuple[str, ...], tmp_path: Path) -> None:
    denied = {"names": ["mount_setattr", "pivot_root"], "action": "SCMP_ACT_ERRNO"}
    (tmp_path / "profile.json").write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denied]}))
    found = check(stack, *given, "--security-opt", f"seccomp={tmp_path}/profile.json")
    assert level(found, "namespace mount") == {"missing"}
    added = remedies({"mount": found["namespace mount"]}, "missing")
    assert "seccomp=unconfined" in added
    found = check(stack, *given, *added)
    assert level(found, "namespace mount", "pivot_root", "job") == {"ok"}


def test_a_state_directory_that_cannot_be_written_to_is_told_and_the_remedy_helps(stack: Stack, given: tuple[str, ...]) -> None:
    found = check(stack, *given, "--read-only", "--tmpfs", "/tmp", "-e", "JOBRUNNERD_STATE_DIR=/srv/state")
    assert level(found, "state directory") == {"missing"}
    assert "-v jobrunner:/var/lib/jobrunner" in found["state directory"]["remedy"]
    found = check(stack, *given, "--read-only", "--tmpfs", "/tmp")  # the image has a volume there
    assert level(found, "state directory", "job") == {"ok"}
