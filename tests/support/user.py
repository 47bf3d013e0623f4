"""A real unprivileged user, by number: what runs as him, and the cgroups that he may be given. Needs root.

He sees this host as anybody would, in a mount namespace where this checkout and its Python can be reached, wherever they are.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobrunner.linux.mountinfo import cgroup_mounts, cgroup_version, own_cgroups
from tests.support.shim import removed, wait_until

UID = 1_800_000_000 + os.getpid()
"""Nobody else's, of another run neither."""
SUBIDS = (1_810_000_000 + os.getpid() % 1000 * 65536, 65536)
"""First and count of the subordinate ids that he may be given."""
ROOT = Path(__file__).parents[2]
ALL = ("cpu", "memory", "pids", "io")
"""As v2 names them."""
OF_V1 = {"cpu": ("cpu", "cpuacct"), "io": ("blkio",)}


@dataclass(frozen=True, slots=True)
class Delegation:
    """A cgroup of the user's. `parent`: its path in every hierarchy, empty for the process's own; `entries` are for who enters."""

    parent: str
    entries: tuple[Path, ...]
    directories: tuple[Path, ...]


NONE = Delegation("", (), ())


def command_as_user(
    command: list[str], delegation: Delegation = NONE, environ: Mapping[str, str] | None = None, ids: bool = False
) -> list[str]:
    """The command line for root that becomes this command as the user, in his cgroup; the environment is this and nothing else.

    `ids`: he has a name, and SUBIDS are his; and a group more, so that what becomes of it can be seen.
    """
    reach = [Path(sys.base_prefix), Path(sys.prefix), ROOT]
    groups = f"--groups={UID + 1}" if ids else "--clear-groups"
    variables = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **(environ or {})}
    script = [
        *_uncover(reach),
        *(_account() if ids else ()),
        *(f"echo $$ > {shlex.quote(str(entry))}" for entry in delegation.entries),
        f"exec setpriv --reuid={UID} --regid={UID} {groups} --inh-caps=-all env -i {_words(variables)} {shlex.join(command)}",
    ]
    return ["unshare", "--mount", "--propagation=private", "sh", "-euc", "\n".join(script)]


def _words(variables: Mapping[str, str]) -> str:
    return shlex.join(f"{name}={value}" for name, value in variables.items())


def _uncover(paths: list[Path]) -> Iterator[str]:
    """Shell: these paths where the user can reach them, though a directory above is closed to him; all else in that is gone."""
    hidden = [path for path in paths if _closed(path)]
    if not hidden:
        return
    yield "stage=$(mktemp -d)"
    yield "mount -t tmpfs tmpfs $stage"
    for number, path in enumerate(hidden):
        yield f"mkdir $stage/{number}; mount --rbind {shlex.quote(str(path))} $stage/{number}"
    for closed in dict.fromkeys(_closed(path) for path in hidden):
        yield f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(closed))}"
    for number, path in enumerate(hidden):
        quoted = shlex.quote(str(path))
        yield f"mkdir -p {quoted}; mount --rbind $stage/{number} {quoted}"
    yield "umount -l $stage; rmdir $stage"


def _account() -> Iterator[str]:
    """Shell: an /etc of his own, in which he is known."""
    yield "account=$(mktemp -d)"
    yield "mount -t tmpfs -o mode=755 tmpfs $account; cp -a /etc $account"
    yield f"echo jobrunner-test:x:{UID}:{UID}::/:/bin/sh >> $account/etc/passwd"
    for file in ("subuid", "subgid"):
        yield f"echo jobrunner-test:{SUBIDS[0]}:{SUBIDS[1]} >> $account/etc/{file}"
    yield "mount --bind $account/etc /etc; umount -l $account; rmdir $account"


def _closed(path: Path) -> Path | None:
    """The topmost directory on the way that others may not enter."""
    return next((above for above in reversed([path, *path.parents]) if not above.stat().st_mode & stat.S_IXOTH), None)


@contextmanager
def home() -> Iterator[Path]:
    """A directory of the user's own."""
    directory = Path(tempfile.mkdtemp(prefix="jobrunner-user-"))
    os.chown(directory, UID, UID)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def delegated(controllers: Sequence[str] = ALL) -> Iterator[Delegation]:
    """These controllers, as an administrator gives them: directories, with their files that may be written to (cgroups(7))."""
    mounts, name = cgroup_mounts(), f"jobrunner-test-{uuid.uuid4().hex[:8]}"
    pure = cgroup_version(mounts) == "v2"
    above = Path(mounts[""].directory(own_cgroups()[""])).parents[1] if pure else Path(mounts[""].point)
    if pure:  # two levels up nobody is at home: tests/vm/guest.sh
        (above / "cgroup.subtree_control").write_text(" ".join(f"{'+' if one in controllers else '-'}{one}" for one in ALL))
    unified = above / name
    names = [name for controller in controllers for name in OF_V1.get(controller, (controller,))]
    v1 = {mounts[name].point for name in names if name in mounts}
    directories = [Path(point, name) for point in v1] + [unified]
    made: list[Path] = []
    try:
        for directory in directories:
            directory.mkdir()
            made.append(directory)
            os.chown(directory, UID, UID)
            for file in ("cgroup.procs", "tasks", "cgroup.subtree_control", "cgroup.threads"):
                if (directory / file).exists():
                    os.chown(directory / file, UID, UID)
        yield Delegation("" if pure else f"/{name}", (unified / "cgroup.procs",), tuple(directories))
    finally:
        for directory in made:
            for path in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
                wait_until(lambda path=path: removed(path))  # type: ignore[misc]
            wait_until(lambda directory=directory: removed(directory))  # type: ignore[misc]


def processes_of_user() -> list[str]:
    """His processes, as `pid state name`; those that are dead already are no more his."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                lines = dict(
                    line.split(":\t", 1) for line in Path("/proc", entry, "status").read_text().splitlines() if ":\t" in line
                )
            except OSError:
                continue
            if lines["Uid"].split()[0] == str(UID) and lines["State"][0] not in "ZX":
                found.append(f"{entry} {lines['State'][0]} {lines['Name']}")
    return found
