"""Jobs of a JobRunner that is not root: isolated as root's are, limited where cgroups are theirs, and told what they lack."""

from __future__ import annotations

import os
import re
import secrets
import signal
from pathlib import Path

import pytest

from jobrunner import JobSpec, Limits, OutputPolicy, StartFailed
from jobrunner.errors import ConfigError, HostError
from jobrunner.offers import Offers, Owner, Volume
from jobrunner.settings import load_runner
from tests.rootless import CONFIG, GIVEN
from tests.support.runner import open_runner, output, run, run_output, shell
from tests.support.shim import all_pids, link_of, read_proc, status_field, wait_until
from tests.support.timing import fail_after


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({"HOME": "/h"}, "/h/.local/state/jobrunner"),
        ({"HOME": "/h", "XDG_STATE_HOME": "/x"}, "/x/jobrunner"),
        ({"HOME": "/h", "XDG_STATE_HOME": "x"}, "/h/.local/state/jobrunner"),
    ],
)
def test_jobs_are_kept_where_a_users_state_is(environ: dict[str, str], place: str) -> None:
    assert load_runner(None, environ, {}).state_dir == Path(place)
    assert load_runner(None, environ, {"state_dir": "/given"}).state_dir == Path("/given")
    assert load_runner(None, {}, {"state_dir": "/given"}).state_dir == Path("/given")
    with pytest.raises(ConfigError, match="state_dir: is not set, and neither is HOME"):
        load_runner(None, {}, {})


OWN = GIVEN == "ids"
"""Whether jobs have uids of their own on the host."""

FACTS = """
id -u; whoami; pwd; echo $HOME; uname -n; cat /proc/self/uid_map
grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status
touch /usr/x 2>/dev/null || echo read-only
echo kept > file; echo again > /dev/stdout; cat file; cat /proc/sys/user/max_user_namespaces; cat /proc/self/oom_score_adj
"""


async def test_a_job_is_isolated_as_it_is_by_root(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **CONFIG) as runner:
        job = await runner.start(shell(FACTS, name="mine"))
        data = await output(job)
        info = await job.wait()
    assert (info.status, info.exit_code) == ("completed", 0), data
    uid, user, none = str(job.record.uid), str(os.geteuid()), "0" * 16
    ids = ("0", user, "1", uid, uid, "1") if OWN else (uid, user, "1")
    assert data.decode().split() == [
        *(uid, "job", "/work", "/work", "mine", *ids),
        *("CapInh:", none, "CapPrm:", none, "CapEff:", none, "CapBnd:", none, "CapAmb:", none, "NoNewPrivs:", "1", "Seccomp:", "2"),
        *("read-only", "again", "kept", "0", "500"),
    ]


RELEASE = re.match(r"(\d+)\.(\d+)", os.uname().release)
TMPFS_HAS_ATTRIBUTES = RELEASE is not None and (int(RELEASE[1]), int(RELEASE[2])) >= (6, 6)
"""Of users: without them an overlay in a user namespace cannot note that a directory of the host's is hidden."""
CHANGES = """
touch /usr/new /etc/new /new && echo x >> /etc/passwd && mkdir -p /opt/new/below && echo made
rm /usr/bin/env /usr/bin/id; ls /usr/bin/env /usr/bin/id 2>/dev/null; cp /usr/bin/true /usr/bin/env && echo replaced
cd /usr/share; rm -r common-licenses && mkdir common-licenses && ls -A common-licenses; cat /etc/shadow || echo closed
"""


async def test_a_root_can_be_written_to_and_nothing_is_kept(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **CONFIG) as runner:
        _, data = await run_output(runner, shell(f"exec 2>&1; {CHANGES}", writable=True))
        _, after = await run_output(runner, shell("ls /usr/bin/env; ls /usr/new 2>/dev/null"))
    lines = [line for line in data.decode().splitlines() if "cat:" not in line and line != "closed"]
    stays = "rm: cannot remove 'common-licenses': Input/output error"
    assert lines == (["made", "replaced"] if TMPFS_HAS_ATTRIBUTES else ["made", "replaced", stays])
    assert after == b"/usr/bin/env\n"


def sleepers(seconds: int) -> list[int]:
    return [pid for pid in all_pids() if read_proc(pid, "cmdline") == f"sleep\0{seconds}\0".encode()]


async def test_its_processes_are_the_users_in_namespaces_of_their_own(tmp_path: Path) -> None:
    seconds = 100 + secrets.randbelow(1 << 30)  # no other has it
    async with open_runner(tmp_path, **CONFIG) as runner:
        job = await runner.start(JobSpec("sleep", (str(seconds),)))
        wait_until(lambda: len(sleepers(seconds)) == 1)
        (pid,) = sleepers(seconds)
        assert set(status_field(pid, "Uid").split()) == {str(job.record.uid if OWN else os.geteuid())}
        names = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
        assert [name for name in names if link_of(pid, f"ns/{name}") == os.readlink(f"/proc/self/ns/{name}")] == []
        uid = f"uid: on the host its processes and files are the server's own user's, uid {os.geteuid()}"
        assert (uid in job.info().missing) is not OWN


@pytest.mark.given("cgroups")
async def test_cgroups_of_the_users_limit_and_count(tmp_path: Path) -> None:
    script = "head -c 1m /dev/zero > file; python3 -c 'x = bytearray(200 << 20); x[::4096] = bytes(len(x[::4096]))'"
    async with open_runner(tmp_path, **CONFIG) as runner:
        info = await run(runner, shell(script, limits=Limits(memory=64 << 20, cpus=0.5)))
        assert (info.status, info.end_reason) == ("failed", "oom_killed")
        assert [text for text in info.missing if ": not limited: " in text] == []
        assert info.usage is not None
        assert info.usage.cpu_system and info.usage.memory_peak and info.usage.pids_peak


@pytest.mark.given("nothing")
async def test_what_is_not_limited_is_told_by_every_job(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **CONFIG) as runner:
        info = await run(runner, shell("exit 3", limits=Limits(memory=64 << 20)))
    assert (info.status, info.exit_code) == ("failed", 3)
    assert [text.partition(":")[0] for text in info.missing] == ["cpus", "memory", "read_bps", "write_bps", "uid"]
    assert all("Permission denied" in text for text in info.missing[:-1])


@pytest.mark.given("nothing")
async def test_what_may_not_be_missing_ends_the_server_at_its_start(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        async with open_runner(tmp_path, allow_missing=("cpus",)):
            pass
    assert "cannot apply limit memory" in caught.value.message
    assert "systemd-run --user --scope -p Delegate=yes" in caught.value.message
    assert 'allow_missing = ["memory", "read_bps", "write_bps"]' in caught.value.message


@pytest.mark.given("nothing")
async def test_a_limit_that_is_not_allowed_to_be_missing_fails_the_start(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **CONFIG) as runner:
        with pytest.raises(HostError, match="cannot apply limit read_iops"):
            await runner.start(shell("true", limits=Limits(read_iops=5)))
        assert await runner.list() == []


async def test_deadline_stop_and_output_limit_are_the_shims(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **CONFIG) as runner:
        late = await run(runner, shell("trap '' TERM; sleep 100", limits=Limits(timeout=0.2), grace=0.1))
        loud = await run(runner, shell("yes", limits=Limits(output_limit=1 << 20, output_policy=OutputPolicy.STOP), grace=0))
        job = await runner.start(shell("trap '' TERM; echo; while :; do sleep 1; done"))
        with fail_after(20):
            async with job.log() as reader:
                await reader.next_line()
        stopped = await job.stop(grace=0.1, by="tester")
    assert [info.end_reason for info in (late, loud, stopped)] == ["deadline", "output_limit", "stopped"]
    assert (stopped.stopped_by, stopped.signal) == ("tester", 9)


async def test_init_dies_with_a_shim_that_is_killed_and_everything_with_init(tmp_path: Path) -> None:
    """The signal at a parent's death is forgotten when credentials change (PR_SET_PDEATHSIG); init's do not after that."""
    seconds = 100 + secrets.randbelow(1 << 30)
    async with open_runner(tmp_path, **CONFIG) as runner:
        job = await runner.start(shell(f"trap '' TERM; setsid sleep {seconds} & sleep {seconds}; true"))
        wait_until(lambda: len(sleepers(seconds)) == 2)
        above = [int(status_field(pid, "PPid")) for pid in sleepers(seconds)]
        shell_pid = next(pid for pid in above if status_field(pid, "Name") == "sh")
        os.kill(int(status_field(int(status_field(shell_pid, "PPid")), "PPid")), signal.SIGKILL)
        with fail_after(20):
            info = await job.wait()
        assert (info.status, info.end_reason) == ("failed", "lost")
        wait_until(lambda: sleepers(seconds) == [])


CLOSE = "mkdir -p a/b/c; echo x > a/b/c/file; cp /bin/true su; chmod 6755 su; chmod 000 a/b/c a/b a .; exit 0"


async def test_what_a_job_has_closed_to_itself_goes_with_its_record(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **CONFIG) as runner:
        info = await run(runner, shell(CLOSE))
        await runner.settled()
        directory = runner.state.directory(info.job_id)
        assert (directory / "work/su").stat().st_mode & 0o7000 == 0
        await runner.remove(info.job_id)
        await runner.settled()
        assert not directory.exists()
        assert list(runner.state.removed.iterdir()) == []


async def test_a_job_writes_to_volumes_of_the_user_and_to_no_others(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    volumes = {"mine": Volume(tmp_path / "mine"), "etc": Volume(Path("/etc")), "theirs": Volume(Path("/usr"), owner=Owner(1, 1))}
    async with open_runner(tmp_path, offers=Offers(volumes=volumes), workspaces=True, **CONFIG) as runner:
        script = (
            "echo x > /volumes/mine/file && stat -c %U /volumes/mine/file && cat /volumes/etc/hostname > there && cat there >&2"
        )
        info, data = await run_output(runner, shell(script, volumes=["mine", "etc:ro"]))
        assert (info.exit_code, data.split()[0]) == (0, b"job")
        assert (tmp_path / "mine/file").stat().st_uid == os.geteuid()
        with pytest.raises(StartFailed, match="its files are user 1's, and jobs of a server that is not root write as its own"):
            await runner.start(shell("true", volumes=["theirs"]))
        info, _ = await run_output(runner, shell("echo x >> kept", workspace="w"))
        info, data = await run_output(runner, shell("cat kept; pwd; echo x >> kept", workspace="w"))
        assert (info.exit_code, data) == (0, b"x\n/workspace\n")


async def test_the_hosts_network_where_it_is_allowed(tmp_path: Path) -> None:
    look = "readlink /proc/self/ns/net; ls /sys/class/net; ls /sys/fs/cgroup; touch /sys/fs/cgroup/x 2>/dev/null || echo none"
    async with open_runner(tmp_path, network_host=True, **CONFIG) as runner:
        info, data = await run_output(runner, shell(look, network="host"))
        _, alone = await run_output(runner, shell("ls /sys/class/net"))
    assert info.exit_code == 0
    words = data.decode().split()
    assert (words[0], words[-1]) == (os.readlink("/proc/self/ns/net"), "none")
    assert set(os.listdir("/sys/class/net")) <= set(words)
    assert "unified" not in words and "jobrunner-vm" not in words
    assert alone == b"lo\n"


async def test_a_command_that_is_not_there_fails_the_start_and_leaves_nothing(tmp_path: Path) -> None:
    async with open_runner(tmp_path, **CONFIG) as runner:
        with pytest.raises(StartFailed) as caught:
            await runner.start(JobSpec("no-such-command"))
        assert (caught.value.step, caught.value.errno) == ("exec", 2)
        assert list(runner.state.jobs.iterdir()) == []
