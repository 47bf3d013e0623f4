"""The state directory: jobs' directories made, read, removed and set aside (docs/formats.md).

Everything here may wait for the disk, so the runner calls it in a thread. Nothing here knows processes or cgroups.

What is not as jobrunner writes it is moved to `corrupt/`, with the reason beside it: nothing is deleted that may not be ours,
and nothing is believed, least of all what belongs to another user. No link is followed. A file that cannot be read for the host's
reasons (EMFILE, EIO) is no reason to move anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from jobrunner.durable import read_file, sync_directory, write_durably, write_temporary
from jobrunner.errors import HostError
from jobrunner.identity import PROJECT_IDS
from jobrunner.job import is_job_id
from jobrunner.linux import subids
from jobrunner.linux.quota import Projects
from jobrunner.linux.tree import remove_tree, reown_empty, reown_tree
from jobrunner.linux.user import give, is_root
from jobrunner.record import JobRecord, RecordError, pack_record, parse_record
from jobrunner.shim.exitrecord import ExitRecord, is_newer, parse_exit
from jobrunner.shim.stopfile import StopRequest, pack_stop, parse_stop

__all__ = ["Found", "StateDir"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What a server finds when it starts: ids by whether the job has its marker."""

    settled: list[str]
    unsettled: list[str]
    leaving: dict[str, int]
    """Of the settled ones those that were not given back yet, and their uids."""
    removed: dict[str, int]
    """Names below `removed`, and the uids that their files may still have."""


class StateDir:
    """The state directory, held by one server at a time."""

    def __init__(self, path: Path, project_ids: tuple[int, int] = PROJECT_IDS) -> None:
        """Make and lock it. HostError if it cannot be made or another server holds it."""
        self.path = path
        self.jobs, self.running, self.leaving = path / "jobs", path / "running", path / "leaving"
        self.removed, self.corrupt = path / "removed", path / "corrupt"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_strangers(path)
            for directory in (self.jobs, self.running, self.leaving, self.removed, self.corrupt):
                directory.mkdir(mode=0o700, exist_ok=True)
            sync_directory(path)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise HostError(f"cannot use state directory {path}: {exc.strerror}") from exc
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._lock)
            raise HostError(f"cannot use state directory {path}: another server holds it") from exc
        self.projects = Projects(path, *project_ids)

    def close(self) -> None:
        os.close(self._lock)

    def directory(self, job_id: str) -> Path:
        return self.jobs / job_id

    def find(self) -> Found:
        """All jobs that are there. Sets aside what is none of ours."""
        marked, leaving = (set(self._entries(directory, "a marker")) for directory in (self.running, self.leaving))
        there = self._entries(self.jobs, "a job's directory")
        for job_id in (marked | leaving).difference(there):  # its job was removed
            self.unmark(job_id)
        return Found(
            [name for name in there if name not in marked],
            [name for name in there if name in marked],
            {name: self._uid(name) for name in there if name in leaving - marked},
            {name: self.owner(self.removed / name) for name in os.listdir(self.removed)},
        )

    def _entries(self, directory: Path, what: str) -> list[str]:
        names = []
        with os.scandir(directory) as entries:
            for entry in list(entries):
                right = entry.is_dir if directory == self.jobs else entry.is_file
                if right(follow_symlinks=False) and is_job_id(entry.name):
                    names.append(entry.name)
                else:
                    self.set_aside(directory / entry.name, f"it is not {what}")
        return names

    def _uid(self, job_id: str) -> int:
        """Of a settled job. 0 if its record cannot be read: then it will be set aside, and no job can come to what is there."""
        try:
            return self.load(job_id).uid
        except (OSError, RecordError):
            return 0

    def owner(self, directory: Path) -> int:
        """The uid of a job of this directory, by its work directory, which is the first to be the server's when it has ended."""
        try:
            return (directory / "work").lstat().st_uid
        except OSError:
            return 0

    def set_aside(self, path: Path, why: str) -> None:
        """Move what cannot be believed to `corrupt/`, with the reason beside it, and tell it."""
        name = os.fsdecode(os.fsencode(path.name)[:200])  # with a number and `.why` it is one name still
        places = (self.corrupt / (f"{name}.{number}" if number else name) for number in itertools.count())
        pairs = ((place, place.with_name(f"{place.name}.why")) for place in places)
        place, reason = next(pair for pair in pairs if not any(map(os.path.lexists, pair)))
        try:
            path.rename(place)
            with reason.open("x", errors="surrogateescape") as file:
                file.write(f"{path}: {why}\n")
        except OSError as exc:
            logger.error("cannot use %s: %s; it cannot be set aside: %s", path, why, exc.strerror)
            return
        logger.error("cannot use %s: %s; set aside as %s", path, why, place)

    def create(self, record: JobRecord) -> None:
        """Make the job's directory and marker, durably: after this a crash leaves a start that recovery finds."""
        directory = self.directory(record.job_id)
        directory.mkdir(mode=0o700)
        (directory / "log").mkdir(mode=0o700)
        work = directory / "work"
        work.mkdir(mode=0o700)
        give(work, record.uid, record.gid)
        # Order: the marker is on disk before job.json has its name, so that no directory with one is ever taken for a settled
        # job's. All that is new is made before anything is synced: a journal takes it in one go then.
        (self.running / record.job_id).touch(mode=0o600)
        temporary = write_temporary(directory / "job.json", pack_record(record))
        sync_directory(self.running)
        temporary.rename(directory / "job.json")
        sync_directory(directory)
        sync_directory(self.jobs)

    def load(self, job_id: str) -> JobRecord:
        """Read job.json. FileNotFoundError if it was never written; RecordError if it is not what this version understands."""
        directory = self.directory(job_id)
        owner = directory.lstat().st_uid
        if owner != os.geteuid():
            raise RecordError(f"it belongs to uid {owner}")
        try:
            return parse_record(read_file(directory / "job.json"), job_id)
        except FileNotFoundError as exc:
            if any(os.path.lexists(directory / name) for name in ("ctl", "exit")):  # which come after it
                raise RecordError("job.json: it is missing") from exc
            raise
        except RecordError as exc:
            raise RecordError(f"job.json: {exc.message}") from exc

    def exit_record(self, job_id: str) -> ExitRecord | None:
        """The exit record; None if there is none or it is damaged, which is told. RecordError if it is of a newer version."""
        path = self.directory(job_id) / "exit"
        try:
            data = read_file(path)
        except FileNotFoundError:
            return None
        except RecordError as exc:
            logger.error("cannot read %s: %s; how the job ended is unknown", path, exc.message)
            return None
        if is_newer(data):
            raise RecordError(f"{path.name}: its version is newer than this server knows")
        record = parse_exit(data)
        if record is None:
            logger.error("cannot read %s: it is damaged; how the job ended is unknown", path)
        return record

    def has_run(self, job_id: str) -> bool:
        """Whether its command was let go, as far as anybody can tell: there is an `exit`, or there is output."""
        directory = self.directory(job_id)
        if os.path.lexists(directory / "exit"):
            return True
        with contextlib.suppress(OSError), os.scandir(directory / "log") as entries:
            return any(entry.name.endswith(".idx") and entry.stat(follow_symlinks=False).st_size for entry in entries)
        return False

    def shim_lives(self, job_id: str) -> bool:
        """Whether a shim reads the job's `ctl`; True too where that cannot be told."""
        try:
            os.close(os.open(self.directory(job_id) / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW))
        except OSError as exc:
            return exc.errno not in (errno.ENXIO, errno.ENOENT)
        return True

    def settle(self, job_id: str) -> bool:
        """The job has ended and everything about it is on disk: after a restart it is settled. False if its uid is taken until
        `reown` has taken over its files.
        """
        if reown_empty(self.directory(job_id) / "work"):
            self.unmark(job_id)
            return True
        try:
            (self.running / job_id).rename(self.leaving / job_id)
        except FileNotFoundError:  # a marker that was lost
            (self.leaving / job_id).touch(mode=0o600)
        return False

    def unmark(self, job_id: str) -> None:
        """There is no such job any more."""
        for directory in (self.running, self.leaving):
            (directory / job_id).unlink(missing_ok=True)

    def reown(self, job_id: str) -> None:
        """What a settled job has left in its work directory becomes the server's: its uid can be another's then. OSError."""
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            (reown_tree if is_root() else subids.take_over)(self.directory(job_id) / "work")
        self.unmark(job_id)

    def remove(self, *job_ids: str) -> None:
        """Remove all of these jobs. A crash leaves each whole, or out of sight, and the next server removes it for good.

        Raises OSError; those that are still in sight then were not removed.
        """
        taken = []
        try:
            for job_id in job_ids:
                with contextlib.suppress(FileNotFoundError):
                    self.directory(job_id).rename(self.removed / job_id)
                taken.append(job_id)
            # Order: out of sight on disk too before anything in it goes, or a power loss would show a job with half its log.
            sync_directory(self.jobs)
        finally:
            for job_id in taken:
                self.remove_for_good(job_id)

    def remove_for_good(self, name: str) -> bool:
        """Remove what is out of sight; False if it cannot be."""
        if not self.clear(self.removed / name):
            return False
        self.unmark(name)
        return True

    def clear(self, path: Path) -> bool:
        """Remove what is on its way out, a job's directory or a workspace. False if it cannot be, which is told."""
        try:
            with self.projects.removing(path / "work"), self.projects.removing(path / "files"):
                if path.is_dir() and not path.is_symlink():
                    self._remove_tree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as exc:
            logger.error("cannot remove %s: %s; the next server tries again", path, exc)
            return False
        return True

    def _remove_tree(self, path: Path) -> None:
        try:
            remove_tree(path)
        except PermissionError:  # of another uid's, where the server is not root: it was not taken over, or not all of it
            if is_root():
                raise
            subids.take_over(path / "work")
            remove_tree(path)

    def write_stop(self, job_id: str, request: StopRequest) -> None:
        """Make a stop durable. A later one only shortens the first one's grace period."""
        before = self.read_stop(job_id)
        if before is not None:
            request = replace(before, grace=min(before.grace, request.grace))
        write_durably(self.directory(job_id) / "stop", pack_stop(request))

    def claim(self, job_id: str) -> bool:
        """Make `ctl`, so that a shim that has not made it yet never starts the job. False if a shim was first."""
        try:
            os.mkfifo(self.directory(job_id) / "ctl", 0o600)
        except FileExistsError:
            return False
        return True

    def stop_was_asked(self, job_id: str) -> bool:
        """Whether there is a stop, also one that cannot be read."""
        return os.path.lexists(self.directory(job_id) / "stop")

    def read_stop(self, job_id: str) -> StopRequest | None:
        """The stop that was asked for, None if there was none, or none that can be read."""
        try:
            return parse_stop(read_file(self.directory(job_id) / "stop"))
        except (OSError, ValueError, RecordError):
            return None

    def kept_bytes(self, job_id: str) -> int:
        """Bytes of the job's log, index included, and of its work directory, where the file system counts them."""
        work = self.projects.usage(self.directory(job_id) / "work") or 0
        with contextlib.suppress(OSError), os.scandir(self.directory(job_id) / "log") as entries:
            return work + sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
        return work


def _refuse_strangers(path: Path) -> None:
    """PermissionError if another user could put files where a server believes what it finds."""
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"it belongs to uid {found.st_uid}")
    if found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, f"other users may write to it; run: chmod go-w {path}")
