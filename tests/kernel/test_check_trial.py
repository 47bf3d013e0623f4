"""The jobs that `jobrunnerd check` runs: what they tell of roots and volumes, each lack made and then mended by its own remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobrunner import Limits
from jobrunner.linux.cgroup import detect
from jobrunner.linux.check_cgroup import JOB_ID
from jobrunner.linux.remedies import NEEDED
from jobrunner.sandbox import base_name
from jobrunner.trial import _untrue
from tests.support.runner import cgroup_directories, open_runner, shims_below
from tests.support.shim import wait_until
from tests.support.timing import at_most

pytestmark = [pytest.mark.requires("root", "command:setpriv"), pytest.mark.timeout(120)]

JOBRUNNERD = str(Path(sys.executable).with_name("jobrunnerd"))
UID = 1900000000
OFFERED = ("root bare", "volume away", "volume of-root", "volume odd")


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path / "settings.toml"


def check(settings: Path, text: str, *wrap: str) -> dict[str, Any]:
    settings.write_text(f'state_dir = "state"\n{text}')
    command = [*wrap, JOBRUNNERD, "check", "--json", "--config", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 3 * any(finding["level"] == "missing" for finding in found.values())
    return found


def test_a_job_is_run_and_nothing_is_left_of_it(settings: Path) -> None:
    (settings.parent / "state").mkdir()
    pid = settings.with_name("pid")
    job = check(settings, "", "sh", "-c", f'echo $$ > "{pid}"; exec "$0" "$@"')["job"]
    assert job["level"] == "ok"
    assert "no capability, filter set, a read-only root" in job["what"]
    assert os.listdir(settings.parent / "state") == []
    assert shims_below(settings.parent) == []
    assert cgroup_directories(f"jobrunner-check-{pid.read_text().strip()}") == []


@pytest.mark.parametrize("until", ["lock", "jobs/*/ctl", "jobs/*/exit"])
def test_a_check_that_is_killed_is_cleared_by_the_next_one(settings: Path, until: str) -> None:
    (settings.parent / "state").mkdir()
    settings.write_text('state_dir = "state"')
    killed = subprocess.Popen([JOBRUNNERD, "check", "--config", str(settings)], stdout=subprocess.DEVNULL)
    wait_until(lambda: any(settings.parent.glob(f"state/.jobrunner-check-*/{until}")), seconds=at_most(30))
    killed.kill()
    killed.wait()
    (left,) = settings.parent.glob("state/.jobrunner-check-*")
    found = check(settings, "")["leavings"]
    assert (found["level"], found["what"]) == ("ok", f"of a check that was killed: {left} is removed, with its jobs")
    assert os.listdir(settings.parent / "state") == []
    assert shims_below(settings.parent) == []
    assert cgroup_directories(base_name(left)) == []
    assert "leavings" not in check(settings, "")


def test_cgroups_of_a_check_that_was_killed_are_removed(settings: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = detect("", f"jobrunner-check-{dead.pid}")
    host.create("0" * 12, Limits(memory=1 << 26))
    assert cgroup_directories(f"jobrunner-check-{dead.pid}") != []
    check(settings, "")
    assert cgroup_directories(f"jobrunner-check-{dead.pid}") == []


async def test_a_server_that_was_killed_while_it_tried_its_limits_keeps_the_next_from_nothing(tmp_path: Path) -> None:
    name = base_name(tmp_path / "state")
    detect("", name).create(JOB_ID, Limits())
    assert cgroup_directories(JOB_ID)
    async with open_runner(tmp_path):
        assert [path for path in cgroup_directories(JOB_ID) if name in path] == []


def test_what_a_stranger_calls_a_check_is_left_alone(settings: Path) -> None:
    stranger = settings.parent / "state/.jobrunner-check-stranger"
    stranger.mkdir(parents=True)
    os.chown(stranger, UID, UID)
    (stranger / "lock").touch()
    assert "leavings" not in check(settings, "")
    assert stranger.exists()


@pytest.mark.parametrize(
    "change",
    [
        ("NoNewPrivs:\t1", "NoNewPrivs:\t0"),
        ("Seccomp:\t2", "Seccomp:\t0"),
        ("CapBnd:\t0000000000000000", "CapBnd:\t0000000000000001"),
        (f"Uid:\t{UID}\t{UID}", f"Uid:\t{UID}\t0"),
        ("Groups:\t \n", "Groups:\t0 \n"),
        ("/ tmpfs ro,nosuid", "/ tmpfs rw,nosuid"),
    ],
)
def test_a_job_that_is_not_as_it_should_be_is_told(change: tuple[str, str]) -> None:
    ids = "\t".join([str(UID)] * 4)
    sets = "".join(f"Cap{name}:\t0000000000000000\n" for name in ("Inh", "Prm", "Eff", "Bnd", "Amb"))
    right = (
        f"Name:\tcat\nUid:\t{ids}\nGid:\t{ids}\nGroups:\t \n{sets}NoNewPrivs:\t1\nSeccomp:\t2\ntmpfs / tmpfs ro,nosuid,nodev 0 0\n"
    )
    assert _untrue(right, UID, own=True) == []
    assert len(_untrue(right.replace(*change), UID, own=True)) == 1


def test_what_is_offered_and_cannot_be_had_is_told_and_the_remedies_help(settings: Path) -> None:
    there = settings.parent
    (there / "of-root").mkdir()
    offered = f"""
workspaces = true
network_host = true
[ceilings]
read_iops = 100
[roots]
bare = "{there}/bare"
[users]
ci = {{id = "4242:4242", for = ["alice"]}}
[volumes]
away = {{path = "{there}/away", owner = "4242:4242"}}
of-root = "{there}/of-root"
odd = {{path = "/proc/tty", owner = "4242:4242"}}
"""
    found = check(settings, offered)
    assert [found[name]["level"] for name in ("job", "writable root", "user ci", "workspace", "network host")] == ["ok"] * 5
    told = {name: (found[name]["level"], found[name]["what"], found[name]["remedy"].partition(",")[0]) for name in OFFERED}
    assert told == {
        "root bare": ("limited", f"root: {there}/bare: No such file or directory", "make the directory"),
        "volume away": ("limited", f"volume: {there}/away: No such file or directory", "make the directory"),
        "volume of-root": ("limited", told["volume of-root"][1], "give the directory to another user"),
        "volume odd": ("limited", told["volume odd"][1], told["volume odd"][2]),
    }
    assert "its directory is root's" in told["volume of-root"][1]
    assert told["volume odd"][1] == "idmap: /proc/tty: Invalid argument"
    assert found["volume odd"]["remedy"].startswith('its file system cannot map ids (Linux 5.12; not NFS); owner = "keep"')
    (there / "bare").mkdir()
    (there / "away").mkdir()
    os.chown(there / "of-root", 4242, 4242)
    mended = check(settings, offered.replace('"/proc/tty", owner = "4242:4242"', '"/proc/tty", owner = "keep"'))
    assert {mended[name]["level"] for name in OFFERED} == {"ok"}


def test_a_state_directory_that_cannot_have_workspaces_is_told_and_the_remedy_helps(settings: Path) -> None:
    there = settings.parent
    for name in ("lower", "upper", "work", "state"):
        (there / name).mkdir()
    layers = f"lowerdir={there}/lower,upperdir={there}/upper,workdir={there}/work"
    command = ["unshare", "--mount", "sh", "-c", 'mount -t overlay -o "$1" overlay "$2" && shift 2 && exec "$@"', "-", layers]
    found = check(settings, "workspaces = true\n", *command, f"{there}/state")
    assert [found[name]["level"] for name in ("job", "workspace")] == ["ok", "limited"]
    assert found["workspace"]["remedy"].startswith("a --state-dir on a file system that can map ids: ext4")
    assert check(settings, "workspaces = true\n")["workspace"]["level"] == "ok"  # without the overlay it is on ext4


def test_the_capabilities_that_are_said_to_be_needed_are_enough_for_all_that_is_offered(settings: Path) -> None:
    cache = settings.parent / "cache"
    cache.mkdir()
    os.chown(cache, 4242, 4242)
    given = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in NEEDED)
    wrap = ("setpriv", f"--bounding-set=-all,{given}", "--")
    found = check(settings, f'workspaces = true\n[volumes]\ncache = "{cache}"\n', *wrap)
    assert [found[name]["level"] for name in ("job", "writable root", "volume cache", "workspace")] == ["ok"] * 4
