"""Jobs with uids of their own: subordinate ids of the server's user's, mapped by the set-uid helpers of his host.

A job that broke out of its root and its namespaces would be a process of the host with its uid, and nothing else. Such
processes are made here, with the ids of a job and with those of another, and try the same.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from jobrunner import JobSpec, Limits, StartFailed
from jobrunner.config import RunnerConfig
from jobrunner.handle import RunnerJob
from jobrunner.identity import range_of
from jobrunner.linux import subids
from jobrunner.linux.user import identity
from jobrunner.offers import Offers, Volume
from jobrunner.runner import JobRunner
from tests.hostile.arena import open_arena
from tests.rootless import CONFIG
from tests.support.runner import open_runner, output, run_output, shell
from tests.support.shim import all_pids, read_proc, status_field, wait_until

pytestmark = [pytest.mark.given("ids"), pytest.mark.requires("command:newuidmap", "command:unshare")]

ATTACKS = {
    "signal": "os.kill(int(sys.argv[1]), 0)",
    "its priority": "os.setpriority(os.PRIO_PROCESS, int(sys.argv[1]), 19)",
    "read": "open(sys.argv[2]).read()",
    "write": "open(sys.argv[2], 'w').write('changed')",
    "list": "os.listdir(os.path.dirname(sys.argv[2]))",
    "remove": "os.unlink(sys.argv[2])",
    "end it": "os.kill(int(sys.argv[1]), signal.SIGKILL)",
}
OWN = shell("echo secret > file; chmod 600 file; echo there; exec sleep 1000")


def as_uid(uid: int, attack: str, *arguments: str) -> str:
    """What a process of the host with this uid and gid comes to, which is in a user namespace with no other ids than these."""
    code = f"import os, signal, sys\ntry:\n {ATTACKS[attack]}\n print('done')\nexcept OSError as exc:\n print(type(exc).__name__)"
    into = [f"--map-{kind}={uid},{uid},1" for kind in ("users", "groups")]
    command = ["unshare", "--user", *into, f"--setuid={uid}", f"--setgid={uid}", "/usr/bin/python3", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd="/").stdout.strip()


async def begun(runner: JobRunner) -> tuple[RunnerJob, int]:
    """A job that has written its file, and the host's number of its command."""
    job = await runner.start(OWN)
    async with job.log() as reader:
        assert (await reader.next_line()) is not None
    wait_until(lambda: len(commands(job.record.uid)) == 1)
    return job, commands(job.record.uid)[0]


def commands(uid: int) -> list[int]:
    return [
        pid
        for pid in all_pids()
        if read_proc(pid, "cmdline") == b"sleep\x001000\0" and status_field(pid, "Uid").split()[0] == str(uid)
    ]


def lacking(job: RunnerJob) -> tuple[str, ...]:
    return tuple(text for text in job.info().missing if text.startswith(("uid:", "groups:")))


def opened(runner: JobRunner, job: RunnerJob) -> Path:
    """Its file; the directories above it let everybody through, so that only the job's own are in the way."""
    file = runner.state.directory(job.job_id) / "work/file"
    for above in file.parents[1:]:
        if above.stat().st_uid == os.geteuid():
            above.chmod(0o711)
    return file


async def test_each_job_has_a_uid_of_its_own_and_no_group_of_the_servers(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **CONFIG) as runner:
        jobs = [await begun(runner) for _ in range(2)]
        ids = subids.granted()
        uids = {job.record.uid for job, _ in jobs}
        assert len(uids) == 2
        assert all(ids.first <= uid < ids.first + ids.count for uid in uids)
        for job, pid in jobs:
            assert set(status_field(pid, "Uid").split()) == set(status_field(pid, "Gid").split()) == {str(job.record.uid)}
            assert status_field(pid, "Groups").split() == []
            assert lacking(job) == ()
        assert len(os.getgroups()) == 1  # there is one that could have stayed
        assert [(await job.stop(grace=0)).end_reason for job, _ in jobs] == ["stopped", "stopped"]


async def test_who_breaks_out_of_one_job_can_do_nothing_to_another(tmp_path: Path) -> None:
    """The control: with the other's uid each of it succeeds."""
    async with open_runner(tmp_path, **CONFIG) as runner:
        (job, pid), (other, _) = await begun(runner), await begun(runner)
        file = opened(runner, job)
        for attack in ATTACKS:
            assert as_uid(other.record.uid, attack, str(pid), str(file)) == "PermissionError", attack
        for attack in ATTACKS:
            assert as_uid(job.record.uid, attack, str(pid), str(file)) == "done", attack


async def test_its_own_pid_1_is_another_user(tmp_path: Path) -> None:
    """So it needs no filter to keep its limits, and gets no signal; without a root the server's files are another's still."""
    async with open_arena(tmp_path, **CONFIG) as arena:
        record = arena.runner.state.directory(arena.bystander.job_id) / "job.json"
        assert (await arena.attack("files", "read", str(record), "SECRET", without=["root", "mask"])).text == "refused: EACCES"
        for attack in (("limit", "1"), ("send_signal", "1", str(int(signal.SIGKILL))), ("trace", "1"), ("root_of", "1")):
            for without in ((), ("seccomp",)):
                assert (await arena.attack("processes", *attack, without=without)).text in ("refused: EPERM", "refused: EACCES")


async def test_and_nothing_to_the_server(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **CONFIG) as runner:
        job, _ = await begun(runner)
        key = tmp_path / "key"
        key.write_text("secret")
        key.chmod(0o600)
        for above in key.parents:
            if above.stat().st_uid == os.geteuid():
                above.chmod(0o711)
        init = int(status_field(commands(job.record.uid)[0], "PPid"))
        for attack, pid in (("signal", os.getpid()), ("end it", init), ("read", 0), ("write", 0)):
            assert as_uid(job.record.uid, attack, str(pid), str(key)) == "PermissionError", attack
        assert key.read_text() == "secret"
        os.kill(init, 0)
        await runner.stop_all(grace=0)


async def settled(runner: JobRunner, job: RunnerJob) -> None:
    """Wait until nothing that it left is its own any more."""
    await runner.settled()
    assert not (runner.state.leaving / job.job_id).exists()


LEAVINGS = """
mkdir -p deep/closed && touch deep/closed/file && chmod 0 deep/closed && mkfifo deep/fifo && ln -s /etc/passwd link
cp /bin/sleep suid && chmod 4755 suid; chmod 0 .; echo left
"""


async def test_what_a_job_leaves_becomes_the_servers_and_is_removed(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **CONFIG) as runner:
        job = await runner.start(shell(LEAVINGS))
        assert await output(job) == b"left\n"
        await job.wait()
        work = runner.state.directory(job.job_id) / "work"
        await settled(runner, job)
        assert {path.lstat().st_uid for path in (work, *work.rglob("*"))} == {os.geteuid()}
        assert not (work / "suid").stat().st_mode & 0o6000
        assert (work / "deep/closed/file").exists()
        await runner.remove(job.job_id)
        assert not work.parent.exists()


async def test_a_job_that_is_removed_by_the_next_server_leaves_nothing(tmp_path: Path) -> None:
    """The server is gone when its job ends; what it has left is another uid's still when the next one comes."""
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state", **CONFIG)) as runner:
        job, pid = await begun(runner)
    os.kill(int(status_field(pid, "PPid")), signal.SIGKILL)  # its pid 1: the server's user's
    assert (runner.state.directory(job.job_id) / "work").stat().st_uid == job.record.uid
    async with open_runner(tmp_path, **CONFIG) as runner:
        found = await runner.get(job.job_id)
        assert (await found.wait()).ended is not None
        await runner.remove(job.job_id)
        assert not runner.state.directory(job.job_id).exists()


def take_over_the_top(directory: Path, uid: int) -> None:
    into = [f"--map-{kind}={uid},{uid},1" for kind in ("users", "groups")]
    command = ["unshare", "--user", "--map-root-user", *into, "chown", "0:0", str(directory)]
    subprocess.run(command, timeout=30, check=True)


@pytest.mark.parametrize("removed", [False, True], ids=["taken over", "removed"])
async def test_what_was_taken_over_in_part_is_finished(tmp_path: Path, removed: bool) -> None:
    """The child that takes it over begins with `work` itself. It was killed with the server; the next one goes on."""
    async with JobRunner.open(RunnerConfig(state_dir=tmp_path / "state", **CONFIG)) as runner:
        job = await runner.start(shell("mkdir -p deep/er && touch deep/er/file; chmod 700 deep; echo there; exec sleep 1000"))
        async with job.log() as reader:
            assert await reader.next_line() is not None
        wait_until(lambda: len(commands(job.record.uid)) == 1)
    os.kill(int(status_field(commands(job.record.uid)[0], "PPid")), signal.SIGKILL)
    wait_until(lambda: not runner.state.shim_lives(job.job_id))
    work = runner.state.directory(job.job_id) / "work"
    take_over_the_top(work, job.record.uid)
    assert (work.stat().st_uid, (work / "deep").stat().st_uid) == (os.geteuid(), job.record.uid)
    if removed:
        work.parent.rename(runner.state.removed / job.job_id)
    async with open_runner(tmp_path, **CONFIG) as runner:
        await runner.settled()
        assert os.listdir(runner.state.removed) == os.listdir(runner.state.leaving) == []
        assert repr(runner.identities).endswith(" 0 taken>")
        assert removed or (work / "deep/er/file").stat().st_uid == os.geteuid()


async def test_what_the_user_keeps_is_his_own_and_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    config = CONFIG | {"workspaces": True, "offers": Offers(volumes={"data": Volume(tmp_path / "data")})}
    told = identity(own=False)
    async with open_runner(tmp_path, **config) as runner:
        for spec in (JobSpec("touch", ("/volumes/data/file",), volumes=("data",)), JobSpec("touch", ("file",), workspace="mine")):
            job = await runner.start(spec)
            info = await job.wait()
            assert (info.exit_code, lacking(job)) == (0, told), await output(job)
        plain = await runner.start(JobSpec("true"))
        assert lacking(plain) == ()
        await plain.wait()
    assert (tmp_path / "data/file").stat().st_uid == os.geteuid()
    assert told[1] == f"groups: the server's user's other groups are the job's too: {os.getgroups()[0]}"


async def test_processes_are_counted_exactly_without_the_pids_controller(tmp_path: Path) -> None:
    script = "i=0; while sleep 100 & [ $i -lt 30 ]; do i=$((i+1)); echo $i; done"
    config = CONFIG | {"cgroup_parent": "", "allow_missing": ("cpus", "memory", "pids", "read_bps", "write_bps")}
    async with open_runner(tmp_path, **config) as runner:
        if runner.cgroup_version:
            pytest.fail("there are cgroups")
        _, data = await run_output(runner, shell(f"exec 2>/dev/null; {script}", limits=Limits(pids=8)))
    assert data.split()[-1:] == [b"6"]


NOT_OF_THE_USER = {
    "no helper": ("HELPERS", ("newuidmap", "no-such-helper"), "there is no no-such-helper"),
    "no range": ("FILES", (Path("/dev/null"), subids.FILES[1]), "/dev/null: no range of jobrunner-test's"),
}


@pytest.mark.parametrize("what", NOT_OF_THE_USER)
async def test_where_something_lacks_jobs_are_the_user_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, value, why = NOT_OF_THE_USER[what]
    monkeypatch.setattr(subids, name, value)
    caplog.set_level("INFO")
    async with open_runner(tmp_path, **CONFIG) as runner:
        job = await runner.start(JobSpec("true"))
        assert lacking(job) == identity(own=False)
        await job.wait()
    assert f"jobs have no uids of their own on the host: {why}" in caplog.text


async def test_a_helper_that_fails_fails_the_start_and_leaves_nothing(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **CONFIG) as runner:
        assert runner.ids is not None
        first, count, (_, gid_helper) = runner.ids.first, runner.ids.count, runner.ids.helpers
        runner.ids = subids.SubIds(first, count, ("/bin/false", gid_helper))
        with pytest.raises(StartFailed, match="userns: /bin/false"):
            await runner.start(OWN)
        assert await runner.list() == []
        assert list(runner.state.jobs.iterdir()) == []


def test_ids_of_the_configuration_must_be_the_users(tmp_path: Path) -> None:
    ids = subids.granted()
    assert subids.of_jobs(tmp_path, (ids.first + 5, 10)).first == ids.first + 5
    with pytest.raises(LookupError, match=f"job_uids, {ids.first - 1} to {ids.first + 8}, are not all of this user's"):
        subids.of_jobs(tmp_path, (ids.first - 1, 10))


def test_servers_of_a_user_have_parts_of_the_range(tmp_path: Path) -> None:
    """Two in sixteen have the same; what that is by is the path, so these always have two."""
    ids = subids.granted()
    parts = [subids.of_jobs(path, range_of(path)) for path in (Path("/state/1"), Path("/state/2"))]
    assert parts[0] != parts[1]
    for part in parts:
        assert ids.first <= part.first
        assert part.first + part.count <= ids.first + ids.count
        assert part.count == ids.count // 16


TAKE_ALL = """
import ctypes, os, time
libc, queues = ctypes.CDLL(None), ctypes.CDLL("librt.so.1")
taken = {"instances": 0, "queues": 0}
while libc.inotify_init1(0) >= 0:
    taken["instances"] += 1
while queues.mq_open(f"/{taken['queues']}".encode(), os.O_CREAT | os.O_RDWR, 0o600, None) >= 0:
    taken["queues"] += 1
print(taken["instances"], taken["queues"], flush=True)
time.sleep(1000)
"""


async def test_what_is_counted_by_user_no_job_takes_all_of(tmp_path: Path) -> None:
    """A user namespace's owner pays as well: the server, which follows output by inotify, and its other jobs."""
    async with open_runner(tmp_path, **CONFIG) as runner:
        jobs = [await runner.start(JobSpec("/usr/bin/python3", ("-c", TAKE_ALL))) for _ in range(2)]
        told = []
        for job in jobs:
            async with job.log() as reader:
                line = await reader.next_line()
            assert line is not None
            told.append([int(number) for number in line.data.split()])
        assert told[0] == told[1]
        most = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
        assert told[0][0] == most // 8
        assert told[0][1] >= 1
        charged = {int(line.split(":")[0]) for line in Path("/proc/key-users").read_text().splitlines()}
        assert os.geteuid() not in charged  # keyrings, of which a user has 200
        assert {job.record.uid for job in jobs} <= charged
