"""What jobs in the container may ask for by name, as docs/container.md sets it up: roots, volumes, workspaces, network, sizes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.stack import PUBLISHED, Cli, Stack, free_address

NAME = "jobrunner-test-offers"
VOLUMES = tuple(f"{NAME}-{kind}" for kind in ("ca", "server", "client", "state"))
OWNER = 4242
SETTINGS = """
workspaces = true
network_host = true
[volumes]
cache = "/srv/cache"
sources = {path = "/srv/sources", read_only = true}
image = {path = "/opt", owner = "4242:4242"}
[roots]
small = "/srv/roots/small"
"""


@pytest.fixture(scope="module")
def offers(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """A server by `docker run` whose settings are a file, and whose volumes and root are directories of the host."""
    there = tmp_path_factory.mktemp("offers")
    (there / "jobrunnerd.toml").write_text(SETTINGS)
    for name in ("cache", "sources", "small/bin", "certs"):
        (there / name).mkdir(parents=True)
    os.chown(there / "cache", OWNER, OWNER)
    (there / "sources/hello").write_text("from the host\n")
    address = free_address()
    mounts = [("jobrunnerd.toml", "/etc/jobrunner/jobrunnerd.toml:ro"), ("cache", "/srv/cache")]
    mounts += [("sources", "/srv/sources:ro"), ("small", "/srv/roots/small:ro")]
    more = " ".join(f"-v {there / source}:{target}" for source, target in mounts)
    changes = {"--name jobrunnerd": f"--name {NAME}", "-v jobrunner-": f"-v {NAME}-", PUBLISHED: address}
    changes["--detach"] = f"--detach --network {stack.network} -e JOBRUNNERD_CONFIG=/etc/jobrunner/jobrunnerd.toml {more}"
    # A program that needs nothing else: the shim, which is linked statically in the image.
    copy = 'cp "$(python3 -c "from jobrunner.shim import binary_path; print(binary_path())")" /small/bin/tool'
    try:
        stack.docker(
            "run", "--rm", "--network", "none", "-v", f"{there}/small:/small", "--entrypoint", "sh", stack.image, "-c", copy
        )
        stack.recipe("Without compose", there, changes)
        stack.wait_until_it_listens(NAME)
        take = (
            "-v",
            f"{VOLUMES[2]}:/certs",
            "-v",
            f"{there}/certs:/out",
            "--entrypoint",
            "cp",
            stack.image,
            "-r",
            "/certs/.",
            "/out",
        )
        stack.docker("run", "--rm", "--network", "none", *take)
        yield Cli(address, there / "certs")
    finally:
        stack.docker("rm", "--force", NAME, check=False)
        stack.docker("volume", "rm", *VOLUMES, check=False)


@pytest.fixture
def there(offers: Cli) -> Path:
    """The directory of the host with what is offered."""
    return offers.certs.parent


def test_a_volume_s_files_are_the_job_s_own_and_its_owner_s_on_the_host(offers: Cli, there: Path) -> None:
    script = "cd /volumes/cache && echo kept > file && stat -c %u file && id -u"
    owner, user = offers("run", "--volume", "cache", "--", "sh", "-c", script).out.split()
    assert owner == user
    assert (there / "cache/file").stat().st_uid == OWNER
    assert offers("run", "--volume", "cache:ro", "--", "cat", "/volumes/cache/file").out == "kept\n"


def test_a_read_only_volume_can_be_read_and_not_written(offers: Cli) -> None:
    script = "cat /volumes/sources/hello; touch /volumes/sources/x"
    done = offers("run", "--volume", "sources:ro", "--", "sh", "-c", script, check=False)
    assert (done.code, done.out) == (1, "from the host\n")
    assert "Read-only file system" in done.err


def test_a_named_root_is_all_that_the_job_sees(offers: Cli) -> None:
    assert offers("run", "--root", "small", "--", "/bin/tool", "probe").out.startswith("clone3 ")
    done = offers("run", "--root", "small", "--", "/bin/sh", check=False)
    assert (done.code, done.err) == (127, 'jobrunner: cannot start "/bin/sh": exec: No such file or directory\n')


def test_a_workspace_is_kept_from_job_to_job(offers: Cli) -> None:
    offers("run", "--workspace", "build", "--", "sh", "-c", "echo one > file")
    assert offers("run", "--workspace", "build", "--", "cat", "file").out == "one\n"
    assert offers("workspace", "ls").out.splitlines()[1].startswith("build ")
    offers("workspace", "rm", "build")


def test_the_host_s_network_is_the_container_s(stack: Stack, offers: Cli) -> None:
    inside = stack.docker("exec", NAME, "readlink", "/proc/self/ns/net").out
    assert offers("run", "--network", "host", "--", "readlink", "/proc/self/ns/net").out == inside
    assert offers("run", "--", "readlink", "/proc/self/ns/net").out != inside


def test_a_work_directory_has_the_size_that_was_asked_for(offers: Cli) -> None:
    script = "dd if=/dev/zero of=big bs=1M count=8"
    done = offers("run", "--work-size", "4MiB", "--", "sh", "-c", script, check=False)
    assert (done.code, "No space left on device" in done.err) == (1, True)
    assert offers("run", "--work-size", "16MiB", "--", "sh", "-c", script).code == 0


def test_a_volume_of_the_image_s_own_layers_is_refused_with_the_reason(offers: Cli) -> None:
    done = offers("run", "--volume", "image", "--", "true", check=False)
    assert done.code == 73
    assert "its file system cannot map ids" in done.err


def test_check_tries_each_of_them(stack: Stack, offers: Cli) -> None:
    done = stack.docker("exec", NAME, "jobrunnerd", "check", "--json")
    found = {finding["name"]: finding for finding in json.loads(done.out)}
    right = ("job", "volume cache", "volume sources", "root small", "workspace", "network host", "cgroup")
    assert {found[name]["level"] for name in right} == {"ok"}
    assert found["volume image"]["level"] == "limited"
    assert 'owner = "keep"' in found["volume image"]["remedy"]
    assert offers("run", "--", "true").code == 0  # beside it the server runs on
