"""A server that is killed at a chosen system call, and what must be there, and nothing else, after it was started again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

from jobrunner.sandbox import base_name
from tests.support.cgroups import directories
from tests.support.daemon import ServerProcess
from tests.support.shim import link_of, status_field, wait_until
from tests.support.timing import at_most

CALLS = {
    "write": "write,pwrite64",
    "fsync": "fsync,fdatasync",
    "rename": "rename,renameat,renameat2",
    "mkdir": "mkdir,mkdirat",
    "unlink": "unlink,unlinkat,rmdir",
    "clone": "clone,clone3,vfork,fork",
    "chown": "chown,lchown,fchown,fchownat",
}
"""What a server is killed at: a name, and the system calls of that name."""


class Killer:
    """strace on every thread that the server has: SIGKILL at the n-th of these calls in any of them. The server is not changed."""

    def __init__(self, pid: int, calls: str, number: int) -> None:
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        who = [part for thread in threads for part in ("-p", str(thread))]
        what = ("-e", f"trace={calls}", "-e", f"inject={calls}:signal=SIGKILL:when={number}")
        command = ["strace", "-qq", "-o", "/dev/null", *what, *who]
        nowhere = subprocess.DEVNULL
        self._strace = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)
        wait_until(lambda: all(map(_is_held, threads)), at_most(20))

    def release(self) -> None:
        """Let go of a server that was not killed."""
        self._strace.send_signal(signal.SIGTERM)
        self._strace.wait(20)


def _is_held(thread: int) -> bool:
    """True too of one that is gone: idle ones leave, and a job's own end may be what kills the server, before all are held."""
    return status_field(thread, "State")[:1] in ("", "Z", "X") or status_field(thread, "TracerPid") != "0"


def is_dead(server: ServerProcess, seconds: float = 0.0) -> bool:
    """Whether the server is gone, now or within this time."""
    try:
        server.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def helpers(state: Path) -> list[str]:
    """Ids of the jobs that have a shim, once for each: it works in the job's directory."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    jobs = state.resolve() / "jobs"
    return sorted(Path(where).name for pid in pids if Path(where := link_of(pid, "cwd")).parent == jobs)


def cgroups(state: Path) -> list[str]:
    """Ids of the jobs that have cgroups."""
    trees = directories(base_name(state.resolve()))
    return sorted({path.name for tree in trees for path in (tree / "jobs").glob("*") if path.is_dir()})


def mounts(state: Path) -> list[str]:
    """Mounts of this host below the state directory: a job's are in its own namespace."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{state.resolve()}/" in line]


def open_files(pid: int) -> list[str]:
    """What a process has open, by kind, but for its connections."""
    links = [link_of(pid, f"fd/{name}").partition(":[")[0] for name in os.listdir(f"/proc/{pid}/fd")]
    return sorted(link for link in links if link not in ("", "socket"))


def owned(state: Path) -> list[str]:
    """Ids of the jobs of which files are not root's."""
    found = set()
    for directory in (state / "jobs").iterdir():
        trees = [directory / "work", *(directory / "work").rglob("*")]
        if any(path.lstat().st_uid != 0 for path in trees if os.path.lexists(path)):
            found.add(directory.name)
    return sorted(found)


def state_of(state: Path) -> dict[str, list[str]]:
    """What is there of jobs on this host, by kind."""
    return {
        "records": sorted(os.listdir(state / "jobs")),
        "markers": sorted(os.listdir(state / "running")),
        "leaving": sorted(os.listdir(state / "leaving")),
        "owned": owned(state),
        "removed": sorted(os.listdir(state / "removed")),
        "corrupt": sorted(os.listdir(state / "corrupt")),
        "cgroups": cgroups(state),
        "shims": helpers(state),
        "mounts": mounts(state),
    }


def assert_exactly(state: Path, running: Collection[str], kept: Collection[str], seconds: float = 15) -> None:
    """Of these jobs, and no others, there is all that should be; what is under way gets this time."""
    alive = sorted(running)
    wanted = {
        "records": sorted([*running, *kept]),
        "markers": alive,
        "leaving": [],
        "owned": alive,
        "removed": [],
        "corrupt": [],
        "mounts": [],
        "cgroups": alive,
        "shims": alive,
    }
    deadline = time.monotonic() + at_most(seconds)
    while (found := state_of(state)) != wanted:
        assert time.monotonic() < deadline, (found, wanted)
        time.sleep(0.02)
