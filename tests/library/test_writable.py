"""`--writable` and `--user`: what a job may change of its root, and who it may be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from jobrunner import JobSpec, Limits
from jobrunner.config import RunnerConfig
from jobrunner.errors import ConfigError, InvalidRequest
from jobrunner.offers import Offers, Owner, User, Volume
from jobrunner.settings import load_runner
from tests.support.runner import open_runner, run, run_output, shell
from tests.support.shim import status_field

pytestmark = pytest.mark.requires("root")

MIB = 1 << 20
CI = Owner(0x6FFF0101, 0x6FFF0102)


async def test_a_writable_root_is_told_and_keeps_its_masks(tmp_path: Path) -> None:
    script = "touch /usr/new /etc/new && echo written; head -c1 /etc/shadow | wc -c; rm /etc/shadow 2>&1 | grep -c busy; whoami"
    async with open_runner(tmp_path) as runner:
        info, data = await run_output(runner, shell(script, writable=True))
        plain, none = await run_output(runner, shell("touch /usr/new"))
    assert (info.writable, plain.writable) == (True, False)
    assert data.split() == [b"written", b"0", b"1", b"job"]
    assert b"Read-only file system" in none


async def test_what_is_written_counts_as_the_jobs_memory(tmp_path: Path) -> None:
    limits = Limits(memory=96 * MIB, tmp_size=1024 * MIB)
    async with open_runner(tmp_path) as runner:
        info = await run(runner, shell("head -c 300M /dev/zero > /usr/x", writable=True, limits=limits), seconds=60)
    assert info.end_reason == "oom_killed"


async def test_the_state_directory_cannot_be_uncovered(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(directory.stat().st_mode | 0o055)
    shown = tmp_path / "shown"
    shown.mkdir(mode=0o755)
    script = (
        f"cd {shown}; rm -rf state; mv state other; rmdir state; ls -A state; "
        f"cd /; mv {shown} /away; ls -A /away/state; ls -A {shown}"
    )
    async with open_runner(shown, show=(str(shown),)) as runner:
        _, data = await run_output(runner, shell(f"exec 2>/dev/null; {script}", writable=True))
        assert (shown / "state" / "jobs").is_dir()
    assert data.split() == [b"state"]


def offering(**users: User) -> dict[str, Any]:
    return {"offers": Offers(users=users)}


async def test_a_job_can_be_a_user_of_the_configuration(tmp_path: Path) -> None:
    script = "id -u; id -g; id -G; whoami; echo $USER $HOME; echo x > /work/file"
    async with open_runner(tmp_path, **offering(ci=User(CI))) as runner:
        info, data = await run_output(runner, shell(script, user="ci"))
        await runner.settled()
        work = runner.state.directory(info.job_id) / "work"
        assert {path.lstat().st_uid for path in (work, work / "file")} == {0}
        own, other = await run_output(runner, shell("id -u"))
    uid, gid = map(str, CI)
    assert data.decode().split() == [uid, gid, gid, "ci", "ci", "/work"]
    assert (info.runs_as, own.runs_as) == ("ci", "")
    assert other.decode().strip() != uid


async def test_two_jobs_of_one_user_share_what_they_share_and_no_more(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    os.chown(cache, *CI)
    offers = {"offers": Offers(users={"ci": User(CI)}, volumes={"cache": Volume(cache)})}
    async with open_runner(tmp_path, **offers) as runner:
        first = await runner.start(
            shell("umask 077; echo mine > /volumes/cache/file; echo; exec sleep 1000", user="ci", volumes=["cache"])
        )
        async with first.log() as reader:
            await anext(reader)
        seen = "cat /volumes/cache/file; ls /work; kill -9 -1; ls -d /proc/[0-9]* | wc -l"
        info, data = await run_output(runner, shell(seen, user="ci", volumes=["cache"]))
        (pid,) = [
            int(name) for name in os.listdir("/proc") if name.isdigit() and status_field(int(name), "Uid").startswith(f"{CI.uid}\t")
        ]
        assert first.status == "running"
        assert status_field(pid, "Name") == "sleep"
        await first.stop(grace=0)
    assert data.startswith(b"mine\n")
    assert info.status == "completed" or info.signal == 9


async def test_a_user_is_for_whom_the_configuration_says(tmp_path: Path) -> None:
    users = offering(ci=User(CI), release=User(CI, callers=("alice",)))
    async with open_runner(tmp_path, **users) as runner:
        for caller, user, reason in [
            ("bob", "release", "'release' is not for 'bob', by this server's configuration"),
            ("bob", "root", "'root' is not in this server's configuration; there are: ci"),
            ("alice", "nobody", "'nobody' is not in this server's configuration; there are: ci, release"),
        ]:
            with pytest.raises(InvalidRequest) as caught:
                await runner.start(JobSpec("true", user=user), user=caller)
            assert (caught.value.field, caught.value.reason) == ("user", reason)
        job = await runner.start(JobSpec("true", user="release"), user="alice")
        assert (await job.wait()).status == "completed"


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ('ci = "0:5"', "id: 0:5 is root, and no job is"),
        ('ci = "5:0"', "id: 5:0 is root, and no job is"),
        ('ci = "root"', "id: 0:0 is root, and no job is"),
        ('ci = "1500"', "'1500' has no group: UID:GID, or the name of a user of this host"),
        ('ci = {for = ["alice"]}', "id: is not set"),
        ('ci = {id = "5:5", for = "alice"}', "for: 'alice' is not a list of users"),
        ('ci = {id = "5:5", groups = ["wheel"]}', "groups: is not known"),
        ('"a b" = "5:5"', "'a b' is no name of A-Z a-z 0-9 _ . - from a letter or digit on"),
        (f'"{"u" * 33}" = "5:5"', "is longer than 32"),
    ],
)
def test_a_user_that_no_job_can_be_is_refused(tmp_path: Path, table: str, reason: str) -> None:
    file = tmp_path / "jobrunnerd.toml"
    file.write_text(f"[users]\n{table}\n")
    with pytest.raises(ConfigError) as caught:
        load_runner(file, {}, {})
    assert str(caught.value).endswith(reason)


def test_users_are_read(tmp_path: Path) -> None:
    file = tmp_path / "jobrunnerd.toml"
    file.write_text('[users]\nci = "1500:1501"\nrelease = {id = "daemon", for = ["alice"]}\n')
    users = load_runner(file, {}, {}).offers.users
    assert users["ci"] == User(Owner(1500, 1501))
    assert users["release"].callers == ("alice",)
    assert 0 not in users["release"].id


def test_a_user_of_the_range_of_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ci: 1005:1 is in job_uids, 1000:10, whose uids are of one job each"):
        RunnerConfig(state_dir=tmp_path, job_uids=(1000, 10), **offering(ci=User(Owner(1005, 1))))
