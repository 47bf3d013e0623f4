"""What a job gets of the host: its root, its volumes and its user, by name, and the size and kind of its own directory.

check       may it have them: by the configuration alone, when the request comes
work_kind   where its own directory is: on disk, bounded by a project quota if it has a size, or in memory
mounts      whose files are they, and how many may there be: by the directories, when it starts
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread

from jobrunner.config import RunnerConfig
from jobrunner.errors import InvalidRequest, StartFailed
from jobrunner.job import Limits
from jobrunner.linux.quota import Projects
from jobrunner.linux.user import is_root
from jobrunner.offers import Volume
from jobrunner.record import JobRecord
from jobrunner.shim.launch import Report, VolumeMount
from jobrunner.spec import JobSpec
from jobrunner.statedir import StateDir
from jobrunner.workspace import Workspaces

__all__ = ["DISK", "MEMORY", "Looks", "check", "defaults", "directories", "mounts", "remedy", "root_of", "work_kind"]

T = TypeVar("T")
VOLUMES = "/volumes"
DISK, MEMORY = "disk", "memory"


def check(spec: JobSpec, caller: str, config: RunnerConfig) -> None:
    """Raise InvalidRequest for what the configuration does not offer, or not to this caller; it says what there is."""
    if spec.stdin:
        raise InvalidRequest("stdin", "this server does not offer it")
    if spec.network == "host" and not config.network_host:
        raise InvalidRequest("network", "this server gives jobs no network (network_host = true in its configuration would)")
    if spec.workspace and not config.workspaces:
        raise InvalidRequest("workspace", "this server keeps none (workspaces = true in its configuration would)")
    if spec.root:
        _offered("root", spec.root, config.offers.roots)
    if spec.user:
        if not is_root():
            raise InvalidRequest("user", "this server is not root: its jobs are its own user")
        mine = {name: user for name, user in config.offers.users.items() if user.callers is None or caller in user.callers}
        if spec.user in config.offers.users and spec.user not in mine:
            raise InvalidRequest("user", f"{spec.user!r} is not for {caller!r}, by this server's configuration")
        _offered("user", spec.user, mine)
    for text in spec.volumes:
        name, read_only = _split(text)
        _offered("volumes", name, config.offers.volumes)
        if config.offers.volumes[name].read_only and not read_only:
            raise InvalidRequest("volumes", f"{name!r} is read-only: ask for {name}:ro")


def root_of(spec: JobSpec, config: RunnerConfig) -> str:
    """The host directory that is the job's root; empty for the host's own programs."""
    return str(config.offers.roots[spec.root]) if spec.root else ""


def directories(spec: JobSpec, config: RunnerConfig) -> list[str]:
    """Host directories that the job sees because the configuration names them."""
    volumes = [str(config.offers.volumes[_split(text)[0]].path) for text in spec.volumes]
    return [*volumes, *config.show, *([root_of(spec, config)] if spec.root else [])]


def defaults(config: RunnerConfig, projects: Projects) -> Limits:
    """The configured ones, and the size of /work on disk where the file system can bound it."""
    found, ceiling = config.defaults, config.ceilings.work_size
    if found.work_size is not None or config.work_quota is None or projects.lack:
        return found
    return replace(found, work_size=config.work_quota if ceiling is None else min(config.work_quota, ceiling))


def work_kind(limits: Limits, projects: Projects) -> str:
    """Where /work of a job with these limits is."""
    return MEMORY if limits.work_size is not None and projects.lack else DISK


class Looks:
    """Threads that look at directories of the host. Those whose file server is dead are left to themselves, up to a number.

    A user has a quarter of it at most: his volume that hangs is no reason why others are kept from theirs.
    """

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self._under_way: dict[object, str] = {}

    async def run(self, user: str, seconds: float, work: Callable[[], T]) -> T:
        """Raises TimeoutError after so many seconds, or at once where as many as may be are under way."""
        look = object()

        def thread() -> T:
            self._under_way[look] = user
            try:
                return work()
            finally:
                self._under_way.pop(look)

        users = list(self._under_way.values())
        if len(users) >= self.most or users.count(user) >= self.most // 4:
            raise TimeoutError
        with anyio.fail_after(seconds):
            return await anyio.to_thread.run_sync(thread, abandon_on_cancel=True)


async def mounts(
    record: JobRecord, config: RunnerConfig, state: StateDir, workspaces: Workspaces, looks: Looks
) -> list[VolumeMount]:
    """The job's volumes and its workspace, and its own directory bounded. Raises StartFailed, LimitReached."""
    if not (record.spec.root or record.spec.volumes or record.spec.workspace or _is_bounded(record)):
        return []
    # A directory may be away for long, or for ever, and quotas are on disk: so not on the loop.
    try:
        return await looks.run(record.user, config.start_timeout, partial(_mounts, record, config, state, workspaces))
    except TimeoutError as exc:
        step, names = ("volume", record.spec.volumes) if record.spec.volumes else ("root", (record.spec.root,))
        raise StartFailed(record.spec.command, step, errno.ETIMEDOUT, " ".join(names)) from exc


def _is_bounded(record: JobRecord) -> bool:
    return record.work == DISK and record.limits.work_size is not None


def _mounts(record: JobRecord, config: RunnerConfig, state: StateDir, workspaces: Workspaces) -> list[VolumeMount]:
    spec = record.spec
    if _is_bounded(record):
        try:
            state.projects.bound(state.directory(record.job_id) / "work", record.limits.work_size)
        except OSError as exc:
            raise StartFailed(spec.command, "work", exc.errno or 0, "project quota") from exc
    if spec.root and os.path.realpath(root_of(spec, config)) != os.path.normpath(root_of(spec, config)):
        raise StartFailed(spec.command, "root", errno.ELOOP, f"{spec.root}: {LINK.replace('[volumes]', '[roots]')}")
    found = [_mount(spec, config.offers.volumes[name], name, read_only) for name, read_only in map(_split, spec.volumes)]
    if spec.workspace:
        found.append(workspaces.prepare(record))
    return found if is_root() else [_as_user(mount, spec) for mount in found]


def _as_user(mount: VolumeMount, spec: JobSpec) -> VolumeMount:
    """For a job whose uid is the server's own on the host: there is nothing to map, and nothing that could be."""
    if mount.owner is None or mount.read_only or mount.owner[0] == os.geteuid():
        return replace(mount, owner=None)
    name, uid = mount.target.rpartition("/")[2], os.geteuid()
    why = f"{name}: its files are user {mount.owner[0]}'s, and jobs of a server that is not root write as its own user, {uid}"
    raise StartFailed(spec.command, "volume", 0, f'{why}; give it to that user, ask for {name}:ro, or set owner = "keep"')


MAPPED = 'its file system cannot map ids (Linux 5.12; not NFS); owner = "keep" in [volumes] leaves the owners as they are'
LINK = "it is, or is below, a symbolic link; [volumes] has to name where that leads"
LOWER = "its file system cannot be below an overlay, or is the second one already; start it without --writable"
NO_RIGHT = "the server lacks CAP_FOWNER, or a security module denies overlays; start it without --writable"
NO_OVERLAY = "this kernel has no overlay file system: modprobe overlay, or start it without --writable"
LAYERS = "the directories of the root, and its /etc, do not fit into tmp_size; start it with a higher one"
HANGS = "a file system of its root or its volumes does not answer, or its CPU limit is too small to be born under"
FILES = "limits.open_files is above what this host allows its server: ulimit -Hn, LimitNOFILE= of a unit, fs.nr_open"
KEYS = "each job of a server that is not root needs a key of its user's: raise kernel.keys.maxkeys, or lower max_running"
REMEDIES = {
    ("idmap", errno.EINVAL): MAPPED,
    ("volume", errno.ELOOP): LINK,
    ("overlay", errno.EINVAL): LOWER,
    ("overlay", errno.EPERM): NO_RIGHT,
    ("overlay", errno.EACCES): NO_RIGHT,
    ("overlay", errno.ENODEV): NO_OVERLAY,
    ("overlay", errno.ENOSPC): LAYERS,
    ("init", errno.ETIMEDOUT): HANGS,
    ("rlimit", errno.EPERM): FILES,
    ("keyring", errno.EDQUOT): KEYS,
}
"""By step and errno."""


def remedy(report: Report) -> str:
    """What to say besides the kernel's reason for a start that failed."""
    return REMEDIES.get((report.step, report.errno), "")


def _mount(spec: JobSpec, volume: Volume, name: str, read_only: bool) -> VolumeMount:
    target = f"{VOLUMES}/{name}"
    if volume.keep_owners or volume.owner is not None:
        return VolumeMount(str(volume.path), target, read_only, volume.owner)
    try:
        found = volume.path.lstat()
    except OSError as exc:
        raise StartFailed(spec.command, "volume", exc.errno or 0, name) from exc
    if stat.S_ISLNK(found.st_mode):  # one above it is the launcher's to refuse
        raise StartFailed(spec.command, "volume", errno.ELOOP, f"{name}: {LINK}")
    if not stat.S_ISDIR(found.st_mode):
        raise StartFailed(spec.command, "volume", errno.ENOTDIR, name)
    if 0 not in (found.st_uid, found.st_gid):
        return VolumeMount(str(volume.path), target, read_only, (found.st_uid, found.st_gid))
    if not read_only:
        why = f'{name}: its directory is root\'s, and no job writes as root; give it to another user, or set owner = "UID:GID"'
        raise StartFailed(spec.command, "volume", 0, why)
    return VolumeMount(str(volume.path), target, read_only)


def _split(text: str) -> tuple[str, bool]:
    return text.removesuffix(":ro"), text.endswith(":ro")


def _offered(field: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        there = ", ".join(sorted(known)) or "none"
        raise InvalidRequest(field, f"{name!r} is not in this server's configuration; there are: {there}")
