"""What a `jobrunnerd check` has left that was killed: found by the next one, told and removed.

Its directory is a state directory, so what is in it is taken over as a server takes over: jobs that still run are stopped, their
cgroups removed. Whether its check lives is told by the lock that every holder of a state directory has.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jobrunner.config import RunnerConfig
from jobrunner.errors import JobRunnerError
from jobrunner.linux.finding import Finding, Level, existing
from jobrunner.linux.tree import remove_tree
from jobrunner.runner import JobRunner

__all__ = ["PREFIX", "clear"]

PREFIX = ".jobrunner-check-"
YOUNG = 60.0
"""Seconds for which a directory without a lock may be one that is just being made."""


async def clear(config: RunnerConfig) -> list[Finding]:
    """Remove it all; `config` is that of a check, with a cgroup of its own."""
    return [await _clear(config, directory) for directory in _dead(config.state_dir)]


async def _clear(config: RunnerConfig, directory: Path) -> Finding:
    try:
        async with JobRunner.open(replace(config, state_dir=directory)) as runner:
            await runner.stop_all(grace=0)
        remove_tree(directory)
    except (JobRunnerError, OSError) as exc:
        return Finding(Level.LIMITED, "leavings", f"of a check that was killed: {directory}: {exc}", "stop its jobs, and remove it")
    return Finding(Level.OK, "leavings", f"of a check that was killed: {directory} is removed, with its jobs")


def _dead(state_dir: Path) -> Iterator[Path]:
    """Directories of checks that are dead, where this one and those before it make theirs; not of others, who may use the name."""
    for place in dict.fromkeys((existing(state_dir.parent), existing(state_dir))):
        for directory in sorted(place.glob(f"{PREFIX}*")):
            found = directory.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022 and not _lives(directory):
                yield directory


def _lives(directory: Path) -> bool:
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return time.time() - directory.lstat().st_mtime < YOUNG
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False
