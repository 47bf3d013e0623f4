"""`jobrunner workspace`, and what a job is given by name, from the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.cli import jobrunner, start, stop
from tests.support.daemon import ServerProcess, server_process

pytestmark = pytest.mark.requires("root")

OWNER = 0x6FFF0001


@pytest.fixture(scope="module")
def offering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that offers a volume, the host's network and workspaces."""
    directory = tmp_path_factory.mktemp("offering")
    volume = directory / "cache"
    volume.mkdir()
    os.chown(volume, OWNER, OWNER)
    settings = directory / "jobrunnerd.toml"
    users = f'ci = "{OWNER}:{OWNER}"\nbob = {{id = "{OWNER}:{OWNER}", for = ["bob"]}}\n'
    settings.write_text(f'workspaces = true\n[volumes]\ncache = "{volume}"\n[users]\n{users}')
    with server_process(directory, f"--config={settings}") as running:
        yield running


def test_a_workspace_is_listed_kept_and_removed(offering: ServerProcess) -> None:
    assert jobrunner(offering, "run", "--workspace", "build", "sh", "-c", "echo kept > file").code == 0
    assert jobrunner(offering, "run", "--workspace", "build", "cat", "file").out == b"kept\n"
    heading, line = jobrunner(offering, "workspace", "ls").text.splitlines()
    assert heading.split() == ["NAME", "SIZE", "USED", "JOB", "USER"]
    assert line.split()[0] == "build"
    assert line.split()[-1] == "admin"
    assert jobrunner(offering, "workspace", "rm", "build").code == 0
    assert jobrunner(offering, "workspace", "ls").text.splitlines() == [" ".join(heading.split()).replace(" ", "  ")]


def test_who_has_a_workspace_is_told_and_keeps_it(offering: ServerProcess) -> None:
    job_id = start(offering, "--workspace", "held", "sleep", "100")
    try:
        again = jobrunner(offering, "run", "--workspace", "held", "true")
        assert (again.code, again.err) == (73, f'jobrunner: cannot start "true": workspace: held is in use by job {job_id}\n')
        assert job_id in jobrunner(offering, "workspace", "ls").text
        removed = jobrunner(offering, "workspace", "rm", "held")
        assert (removed.code, job_id in removed.err) == (65, True)
    finally:
        stop(offering, job_id)


def test_a_viewer_sees_no_workspaces(offering: ServerProcess) -> None:
    assert jobrunner(offering, "workspace", "ls", user="viewer").code == 77


def test_a_volume_and_sizes_are_told_by_info(offering: ServerProcess) -> None:
    job_id = start(offering, "--volume", "cache", "--tmp-size", "1MiB", "--work-size", "2MiB", "sh", "-c", "touch /volumes/cache/x")
    assert jobrunner(offering, "wait", job_id).code == 0
    told = jobrunner(offering, "info", job_id).text
    assert "volumes:    cache\n" in told
    assert "tmp_size=1MiB work_size=2MiB" in told


def test_an_unknown_volume_is_refused_with_those_that_there_are(offering: ServerProcess) -> None:
    result = jobrunner(offering, "start", "--volume", "nosuch", "true")
    assert (result.code, "there are: cache" in result.err) == (65, True)


def test_a_job_writes_to_its_root_as_a_user_of_the_configuration(offering: ServerProcess) -> None:
    script = "touch /usr/new && id -u && whoami"
    job_id = start(offering, "--writable", "--user", "ci", "sh", "-c", script)
    assert jobrunner(offering, "wait", job_id).code == 0
    assert jobrunner(offering, "log", job_id).text.split() == [str(OWNER), "ci"]
    told = jobrunner(offering, "info", job_id).text
    assert "writable:   yes\n" in told
    assert "runs as:    ci\n" in told
    assert f"  admin (ci)  sh -c '{script}'" in jobrunner(offering, "ls").text
    assert jobrunner(offering, "run", "sh", "-c", script).code != 0


def test_a_user_that_is_for_others_is_refused(offering: ServerProcess) -> None:
    refused = jobrunner(offering, "run", "--user", "bob", "true")
    assert (refused.code, "'bob' is not for 'admin'" in refused.err) == (65, True)
