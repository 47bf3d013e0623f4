"""A hostile job of a server that is not root: on the host it has the server's own uid, and so has its pid 1.

What keeps it from both is tried here with it; what only root's jobs have more of is in tests/hostile.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from jobrunner import Limits
from tests.hostile.arena import Arena, outside, program
from tests.hostile.inside.base import REFUSED
from tests.rootless import GIVEN

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.requires("command:python3")]

ITS_INIT = ["trace", "peek", "environment_of", "look_at_descriptors", "root_of", "helper_program", "forge_end"]


@pytest.mark.parametrize("name", ITS_INIT)
async def test_pid_1_has_the_jobs_uid_and_is_out_of_its_reach(arena: Arena, name: str) -> None:
    """Not dumpable, and with a capability more: without the filter too. The control is the next test."""
    for without in ((), ("seccomp",)):
        outcome = await arena.attack("processes", name, "1", without=without)
        assert (outcome.word, outcome.why) in (("refused", "EPERM"), ("refused", "EACCES")), without


async def test_files_of_pid_1_that_ask_for_its_uid_alone_are_roots(arena: Arena) -> None:
    for name in ("oom_score_adj", "autogroup", "coredump_filter", "comm"):
        assert (await arena.attack("files", "open_for_writing", f"/proc/1/{name}")).text == "refused: EACCES", name
        assert (await arena.attack("files", "open_for_writing", f"/proc/self/{name}")).word == "succeeded", name


async def test_a_process_of_its_own_is_not(arena: Arena) -> None:
    assert (await arena.attack("processes", "trace_own_child")).word == "succeeded"
    assert (await arena.attack("processes", "peek", "self")).word == "succeeded"


STARVE = {"priority": ("renice", "1"), "scheduling": ("idle", "1"), "processors": ("pin", "1"), "the user's": ("renice_user",)}


@pytest.mark.parametrize("attack", STARVE.values(), ids=STARVE)
async def test_pid_1_cannot_be_starved(arena: Arena, attack: tuple[str, ...]) -> None:
    """Because of the capability that it has more (sched(7)); the control is below: who has no more can be."""
    for without in ((), ("seccomp",)):
        assert (await arena.attack("processes", *attack, without=without)).text in ("refused: EPERM", "refused: EACCES")


async def test_pid_1_keeps_its_limits(arena: Arena) -> None:
    """Nothing but the filter is in the way of who has its uid."""
    assert (await arena.attack("processes", "limit", "1")).text == "refused: EPERM"
    assert (await arena.attack("processes", "limit", "1", without=["seccomp"])).word == "succeeded"


async def test_ones_own_limits_and_priority_can_be_lowered(arena: Arena) -> None:
    for name in ("limit", "renice", "idle", "pin"):
        assert (await arena.attack("processes", name, "0")).word == "succeeded", name


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGRTMAX])
async def test_pid_1_is_not_ended_from_within(arena: Arena, number: signal.Signals) -> None:
    outcome = await arena.attack("processes", "send_signal", "1", str(int(number)))
    assert (outcome.info.end_reason, outcome.word) == ("exited", "succeeded")


async def test_a_signal_to_everyone_reaches_the_jobs_own_only(arena: Arena) -> None:
    assert (await arena.attack("processes", "everyone")).text == f"succeeded: our own died of {signal.SIGKILL:d}"
    await arena.heartbeat()


NEW_USER_NAMESPACES = {"unshare": ("unshare", "user"), "clone": ("clone_user",), "clone3": ("clone3_user",)}


@pytest.mark.parametrize("attack", NEW_USER_NAMESPACES.values(), ids=NEW_USER_NAMESPACES)
async def test_no_user_namespace_is_made_in_a_jobs(arena: Arena, attack: tuple[str, ...]) -> None:
    """By the filter, and by the number of them that its own allows, each alone."""
    assert (await arena.attack("calls", *attack)).word == "refused"
    assert (await arena.attack("calls", *attack, without=["seccomp"])).text == "refused: ENOSPC"


RIGHTS = {
    "mount": ("mount_tmpfs", "/tmp"),
    "a writable root": ("remount_writable", "/usr"),
    "a bare /etc/shadow": ("unmount", "/etc/shadow"),
    "a mount namespace": ("unshare", "mount"),
    "chroot": ("chroot",),
    "the host name": ("set_host_name",),
    "raw sockets": ("raw_socket", "inet"),
}


@pytest.mark.parametrize("attack", RIGHTS.values(), ids=RIGHTS)
async def test_the_rights_of_its_user_namespace_are_not_the_jobs(arena: Arena, attack: tuple[str, ...]) -> None:
    for without in ((), ("seccomp",)):
        assert (await arena.attack("calls", *attack, without=without)).text == "refused: EPERM"


async def test_records_of_others_are_not_there(arena: Arena) -> None:
    record = arena.runner.state.directory(arena.bystander.job_id) / "job.json"
    assert b"SECRET" in record.read_bytes()
    assert (await arena.attack("files", "read", str(record), "SECRET")).text == "refused: ENOENT"
    assert (await arena.attack("files", "read", str(record), "SECRET", without=["root", "mask"])).word == "succeeded"


async def test_nothing_above_the_root_can_be_reached(arena: Arena, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    for writable in (False, True):
        assert (await arena.attack("roots", "climb", str(mark), writable=writable)).text == "refused: not there", writable
    assert outside("roots", "climb", str(mark)).startswith("succeeded")


@pytest.mark.given("cgroups")
async def test_its_limits_are_its_users_files_and_cannot_be_written_to(arena: Arena) -> None:
    """Only that they are mounted read-only is in the way."""
    job = await arena.start("sh", "-c", "ls -d /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null")
    with_line = (await arena.outcome(job)).why
    assert (await arena.attack("files", "open_for_writing", with_line)).text == "refused: EROFS"


async def test_who_ignores_every_signal_is_ended_and_told(arena: Arena) -> None:
    job = await arena.start(*program("processes", "ignore_everything"))
    async with job.log() as reader:
        assert (await reader.next_line()) is not None
    info = await job.stop(grace=0.2, by="bob")
    assert (info.status, info.end_reason, info.signal) == ("terminated", "stopped", signal.SIGKILL)


async def test_a_fork_bomb_meets_its_limit_exactly(arena: Arena) -> None:
    """By the pids controller, or without one by the count of tasks that a user namespace has: both with pid 1."""
    outcome = await arena.attack("bombs", "forks", "200", limits=Limits(pids=24, timeout=20))
    assert (outcome.text, outcome.info.exit_code) == ("refused: EAGAIN", REFUSED), GIVEN
    assert b"22 children\n" in outcome.output
