"""Waiting for a directory, with the kernel's own events."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from jobrunner.errors import HostError
from jobrunner.linux.inotify import Inotify, Watch


@pytest.fixture
async def inotify() -> AsyncIterator[Inotify]:
    before = len(os.listdir("/proc/self/fd"))
    instance = Inotify()
    yield instance
    instance.close()
    instance.close()
    assert len(os.listdir("/proc/self/fd")) == before


async def done(watch: Watch) -> None:
    with anyio.fail_after(5):
        await watch


async def settled() -> None:
    """Every event that the kernel has queued before this has been read: the loop has polled and run what was ready."""
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.mark.parametrize("change", ["append", "create", "rename", "remove"])
async def test_a_change_after_the_watch_completes_it(inotify: Inotify, tmp_path: Path, change: str) -> None:
    directory = tmp_path / "log"
    directory.mkdir()
    file = directory / "file"
    file.touch()
    (tmp_path / "new").touch()
    if change == "remove":
        file.unlink()
    watch = inotify.changed(str(directory))
    await settled()
    assert not watch.done
    match change:
        case "append":
            file.write_text("x")
        case "create":
            (directory / "other").touch()
        case "rename":
            (tmp_path / "new").rename(directory / "new")
        case "remove":
            directory.rmdir()
    await done(watch)


async def test_a_change_before_the_await_is_not_lost(inotify: Inotify, tmp_path: Path) -> None:
    watch = inotify.changed(str(tmp_path))
    (tmp_path / "x").touch()
    await settled()
    assert watch.done
    await done(watch)


async def test_all_who_wait_for_a_directory_share_a_watch_and_wake_together(inotify: Inotify, tmp_path: Path) -> None:
    watches = [inotify.changed(str(tmp_path)) for _ in range(100)]
    assert len(set(map(id, watches))) == 1
    waiting = [asyncio.create_task(done(watch)) for watch in watches]
    await settled()
    (tmp_path / "x").touch()
    await asyncio.gather(*waiting)


async def test_another_directory_does_not_wake(inotify: Inotify, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other = (inotify.changed(str(tmp_path / name)) for name in ("a", "b"))
    (tmp_path / "a" / "x").touch()
    await done(one)
    await settled()
    assert not other.done


async def test_many_changes_are_one_event_until_the_next_watch(inotify: Inotify, tmp_path: Path) -> None:
    file = tmp_path / "x"
    watch = inotify.changed(str(tmp_path))
    for _ in range(1000):
        file.write_text("x")
    await done(watch)
    again = inotify.changed(str(tmp_path))
    await settled()
    assert again is not watch
    assert not again.done
    file.write_text("y")
    await done(again)


async def test_a_cancelled_waiter_neither_wakes_the_others_nor_stays(inotify: Inotify, tmp_path: Path) -> None:
    watch = inotify.changed(str(tmp_path))
    first, second = (asyncio.create_task(done(watch)) for _ in range(2))
    await settled()
    assert repr(watch) == "<Watch 2 waiting>"
    first.cancel()
    await settled()
    assert repr(watch) == "<Watch 1 waiting>"
    assert not second.done()
    (tmp_path / "x").touch()
    await second


async def test_wake_lets_go_without_a_change_and_the_next_watch_works(inotify: Inotify, tmp_path: Path) -> None:
    watch = inotify.changed(str(tmp_path))
    inotify.wake(str(tmp_path))
    await done(watch)
    again = inotify.changed(str(tmp_path))
    await settled()
    assert not again.done
    (tmp_path / "x").touch()
    await done(again)
    inotify.wake(str(tmp_path))


async def test_a_directory_that_is_made_anew_is_watched_anew(inotify: Inotify, tmp_path: Path) -> None:
    directory = tmp_path / "log"
    directory.mkdir()
    old = inotify.changed(str(directory))
    directory.rmdir()
    directory.mkdir()
    await done(old)
    new = inotify.changed(str(directory))
    (directory / "x").touch()
    await done(new)


async def test_a_directory_that_is_not_there_is_done_soon(inotify: Inotify, tmp_path: Path) -> None:
    watch = inotify.changed(str(tmp_path / "absent"))
    assert not watch.done
    await done(watch)


async def test_two_names_of_a_directory_share_its_watch(inotify: Inotify, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    watches = [inotify.changed(str(tmp_path / name)) for name in ("real", "link")]
    (tmp_path / "real" / "x").touch()
    for watch in watches:
        await done(watch)


async def test_close_lets_everyone_go_and_takes_no_more(tmp_path: Path) -> None:
    inotify = Inotify()
    waiting = asyncio.create_task(done(inotify.changed(str(tmp_path))))
    await settled()
    inotify.close()
    await waiting
    with pytest.raises(HostError, match=r"cannot watch .*: the runner is closed"):
        inotify.changed(str(tmp_path))


async def test_instances_that_are_used_up_are_told_with_the_remedy() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # the same error as for instances, which all of this user share
    try:
        with pytest.raises(HostError, match="Too many open files; raise the sysctl fs.inotify.max_user_instances"):
            Inotify()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
