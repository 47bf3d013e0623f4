"""Workspaces: directories that are kept from one job of a user to the next, and that one job has at a time.

    STATE/workspaces/<user>/<name>          made for the first job that asks; modified when a job began with it
    STATE/workspaces/<user>/<name>/files    what jobs see, at /workspace; owned by a uid that no job has, and mapped to that of
                                            each job; with a project quota (linux/quota.py) if workspaces have a size

Who has one is not on disk: it is the running job whose record asks for it, so a server that restarts knows it again.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from urllib.parse import quote, unquote

from jobrunner.errors import InvalidRequest, LimitReached, StartFailed
from jobrunner.job import Workspace
from jobrunner.linux.tree import tree_size
from jobrunner.linux.user import give
from jobrunner.record import JobRecord
from jobrunner.shim.launch import VolumeMount
from jobrunner.spec import JobSpec, is_name
from jobrunner.statedir import StateDir

__all__ = ["TARGET", "Workspaces"]

TARGET = "/workspace"
NAME_MAX = 255
"""Bytes of one name in a directory: pathname(7)."""
REMOVAL = "a removal"

Key = tuple[str, str]
"""User and name."""


class Workspaces:
    """Those of one state directory. What looks at the disk is not for the event loop; `hold`, `release` and `holder` are."""

    def __init__(self, state: StateDir, owner: int, most: int, size: int | None) -> None:
        """`owner` is whose the files are on disk, `most` how many a user may have, `size` what each may take, in bytes."""
        self.path = state.path / "workspaces"
        self._state = state
        self._owner = owner
        self._most = most
        self._size = size
        self._making = threading.Lock()
        self._held: dict[Key, str] = {}

    def __repr__(self) -> str:
        return f"<Workspaces {self.path} {len(self._held)} held>"

    def hold(self, spec: JobSpec, user: str, job_id: str) -> None:
        """The job has what it asks for from here on. Raises StartFailed that says who has it; InvalidRequest."""
        name = spec.workspace
        if not name:
            return
        if len(_encoded(user)) > NAME_MAX:
            raise InvalidRequest("workspace", f"the user's name is too long to keep one: more than {NAME_MAX} bytes, encoded")
        holder = self._held.get((user, name))
        if holder is not None:
            raise StartFailed(spec.command, "workspace", 0, f"{name} is in use by {holder}")
        self._held[user, name] = f"job {job_id}"

    def keep(self, record: JobRecord) -> None:
        """This job runs; a server before this one may have started it."""
        if record.spec.workspace:
            self._held[record.user, record.spec.workspace] = f"job {record.job_id}"

    def release(self, job_id: str) -> None:
        """The job is gone, and nothing of it runs."""
        for key in [key for key, holder in self._held.items() if holder == f"job {job_id}"]:
            del self._held[key]

    def prepare(self, record: JobRecord) -> VolumeMount:
        """Make it if it is not there, and see that it has its size. Raises StartFailed, LimitReached."""
        try:
            return self._prepare(record)
        except OSError as exc:
            raise StartFailed(record.spec.command, "workspace", exc.errno or 0, record.spec.workspace) from exc

    def _prepare(self, record: JobRecord) -> VolumeMount:
        place = self._place(record.user, record.spec.workspace)
        files = place / "files"
        with self._making:  # those of starts at once are counted too
            if not place.is_dir() and len(_names(place.parent)) >= self._most:
                what = f'user "{record.user}" has {self._most} workspaces; remove one'
                raise LimitReached("start job", "workspaces_per_user", what)
            for directory in (self.path, place.parent, place):
                directory.mkdir(mode=0o700, exist_ok=True)
        if not files.is_dir():
            # Order: it is there with its owner or not at all, or a crash would leave one of root's.
            made = place / ".new"
            made.mkdir(mode=0o700, exist_ok=True)
            give(made, self._owner, self._owner)
            made.rename(files)
        self._bound(record, files)
        os.utime(place)
        found = files.stat()
        return VolumeMount(str(files), TARGET, False, (found.st_uid, found.st_gid))

    def _bound(self, record: JobRecord, files: Path) -> None:
        projects = self._state.projects
        bounded = not projects.lack and projects.has(files)
        if self._size is None and not bounded:
            return
        if not bounded and any(files.iterdir()):
            name = record.spec.workspace
            why = f"{name} was made without workspace_size, so what is in it cannot be counted: jobrunner workspace rm {name}"
            raise StartFailed(record.spec.command, "workspace", 0, why)
        projects.bound(files, self._size)

    def list(self) -> list[Workspace]:
        """All, by user and name."""
        found = []
        for user in _names(self.path):
            for name in _names(self.path / user):
                key = (_decoded(user), name)
                holder = self._held.get(key, "")
                place = self.path / user / name
                try:
                    used = place.stat().st_mtime
                except FileNotFoundError:  # removed meanwhile
                    continue
                size = self._state.projects.usage(place / "files")
                if size is None and not holder:
                    size = _counted(place)
                found.append(Workspace(*key, used, size, holder.removeprefix("job ")))
        return found

    def claim(self, user: str, name: str) -> None:
        """Keep jobs from it while it is removed. Raises InvalidRequest if there is none, or a job has it."""
        holder = self._held.get((user, name))
        if holder is not None:
            raise InvalidRequest("name", f"{name} is in use by {holder}", verb="remove workspace")
        if len(_encoded(user)) > NAME_MAX or not is_name(name) or not self._place(user, name).is_dir():
            raise InvalidRequest("name", f"{name!r} is no workspace of this user", verb="remove workspace")
        self._held[user, name] = REMOVAL

    def remove(self, user: str, name: str) -> None:
        """Remove one that was claimed."""
        try:
            gone = self._state.removed / f"workspace.{time.time_ns()}"
            self._place(user, name).rename(gone)
            self._state.clear(gone)
        finally:
            del self._held[user, name]

    def _place(self, user: str, name: str) -> Path:
        return self.path / _encoded(user) / name


def _counted(place: Path) -> int | None:
    """None if a job has begun with it, or it was removed, while it was counted."""
    try:
        return tree_size(place)
    except OSError:
        return None


def _names(directory: Path) -> list[str]:
    """Of the directories in it."""
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))


def _encoded(user: str) -> str:
    """A name for a directory: no user's is `.`, hidden, empty, or another's."""
    return quote(user, safe="", errors="surrogateescape").replace(".", "%2E") or "%"


def _decoded(name: str) -> str:
    return "" if name == "%" else unquote(name, errors="surrogateescape")
