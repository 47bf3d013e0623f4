"""Start one job: the item list that its launcher is given; and the handle on the `ctl` of its shim.

This process is never a job's parent and never in its data path: the launcher leaves once the command has been executed, and what is
left is a FIFO whose only reader is the shim.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from jobrunner import places
from jobrunner.config import RunnerConfig
from jobrunner.errors import JobRunnerError, StartFailed
from jobrunner.job import OutputPolicy, signal_number
from jobrunner.launcher import Launcher
from jobrunner.linux import check, subids
from jobrunner.linux.cgroup import CgroupHost, JobCgroup
from jobrunner.linux.subids import SubIds
from jobrunner.linux.user import identity, is_root
from jobrunner.record import JobRecord
from jobrunner.shim import binary_path
from jobrunner.shim.exitrecord import read_exit
from jobrunner.shim.launch import PROTECTIONS, LaunchPlan, VolumeMount, pack_plan
from jobrunner.workspace import TARGET

logger = logging.getLogger(__name__)

USER = "job"
"""What a job's user is called inside, if it is none of the configuration's."""
WORK = "/work"
"""The job's own directory, as it sees it."""
DEFAULT_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": WORK,
    "USER": USER,
    "LOGNAME": USER,
    "LANG": "C.UTF-8",
}
SHOW = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt")
"""What every job sees of the host; the configuration adds to it."""
HIDE = (
    *("/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/security/opasswd", "/etc/sudoers", "/etc/sudoers.d"),
    *("/etc/ssh/ssh_host_rsa_key", "/etc/ssh/ssh_host_ecdsa_key", "/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/ssh_host_dsa_key"),
    *("/etc/ssl/private", "/etc/krb5.keytab"),
)
"""Secrets below what is shown. No job's uid could read most of them anyway; masked, they are not there."""
HOST_NAME_MAX = 64
"""sethostname(2)."""


def needs(config: RunnerConfig) -> check.Needs:
    """What this configuration asks of the host."""
    return check.Needs(
        state_dir=config.state_dir,
        shim=binary_path(),
        cgroup_parent=config.cgroup_parent,
        defaults=config.defaults,
        allow_missing=config.allow_missing,
        max_running=config.max_running,
        job_uids=config.job_uids,
        project_ids=config.project_ids,
        work_quota=config.work_quota,
        workspaces=config.workspaces,
        workspace_size=config.workspace_size,
    )


def check_host(config: RunnerConfig) -> None:
    """HostError, in the words of `jobrunnerd check`, if jobs cannot be born here at all. A few milliseconds, so not on the loop."""
    check.refuse([*check.quick(needs(config)), check.workspaces(needs(config))])


def own_ids(config: RunnerConfig) -> SubIds | None:
    """The ids of jobs of a server that is not root; None if it is, or has none to give: `check` says why. Not on the loop."""
    try:
        return None if is_root() else subids.of_jobs(config.state_dir, config.job_uids)
    except (LookupError, OSError) as exc:
        logger.info("jobs have no uids of their own on the host: %s", exc)
        return None


def check_limits(config: RunnerConfig, cgroups: CgroupHost, own: bool) -> None:
    """HostError, in the words of `jobrunnerd check`, if the configured defaults cannot be applied: then no job could be started.

    What may be missing is told in the log.
    """
    findings = check.limits_apply(cgroups, needs(config))
    check.refuse(findings)
    for what in (*(finding.what for finding in findings), *identity(own)):
        logger.info("what jobs lack here: %s", what)


def base_name(state_dir: Path) -> str:
    """The name of this state directory's part of the cgroup tree: two servers of one host never share one."""
    return f"jobrunner-{hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:8]}"


async def launch(
    launcher: Launcher,
    record: JobRecord,
    cgroup: JobCgroup,
    directory: Path,
    config: RunnerConfig,
    calls: bytes,
    volumes: Sequence[VolumeMount] = (),
    ids: SubIds | None = None,
) -> float:
    """Have the launcher run until the job's command has been executed; when that was, by the shim's clock, seconds since the epoch.
    `calls` is the filter of system calls; `ids` has the job's uid where the server is not root and the job has one of its own.

    Raises StartFailed with the step that failed, and then no process is left; LauncherLost if nobody told.
    """
    try:
        launcher.prepare(pack_plan(_plan(record, cgroup, directory, config, calls, volumes, ids)))
    except OSError as exc:
        raise StartFailed(record.spec.command, "launcher", exc.errno or 0) from exc
    report = await launcher.run()
    if report is None:
        raise LauncherLost(f'cannot start "{record.spec.command}": the launcher was killed')
    if not report.started:
        raise StartFailed(
            record.spec.command, report.step, report.errno, ": ".join(filter(None, (report.detail, places.remedy(report))))
        )
    started = read_exit(directory / "exit")  # written just now, so it is in memory
    return started.started_ns / 1e9 if started else record.created


def _plan(
    record: JobRecord,
    cgroup: JobCgroup,
    directory: Path,
    config: RunnerConfig,
    calls: bytes,
    volumes: Sequence[VolumeMount],
    ids: SubIds | None,
) -> LaunchPlan:
    spec, limits = record.spec, record.limits
    return LaunchPlan(
        directory=str(directory),
        command=(spec.command, *spec.args),
        env={**DEFAULT_ENV, **({"USER": spec.user, "LOGNAME": spec.user} if spec.user else {}), **spec.env},
        cwd=spec.cwd or (TARGET if spec.workspace else WORK),
        hostname=(spec.name or record.job_id)[:HOST_NAME_MAX],
        cgroup_items=cgroup.launch_items(),
        network_host=spec.network == "host",
        merge=spec.merge,
        stop_signal=signal_number(spec.stop_signal),
        grace=config.grace if spec.grace is None else spec.grace,
        birth=config.start_timeout,
        timeout=limits.timeout,
        idle_timeout=limits.idle_timeout,
        open_files=limits.open_files,
        segment_bytes=_segment_bytes(limits.output_limit, config.segment_bytes),
        output_limit=limits.output_limit,
        output_policy=limits.output_policy or OutputPolicy.DROP_OLDEST,
        on_write_error=config.on_write_error,
        uid=record.uid,
        gid=record.gid,
        user_namespace=not is_root(),
        id_helpers=ids.helpers if ids else None,
        user_name=spec.user or USER,
        show=() if spec.root else (*SHOW, *config.show),
        root=places.root_of(spec, config),
        writable=spec.writable,
        volumes=volumes,
        mask=(*HIDE, *config.hide, str(directory.parent.parent)),  # the state directory, without links
        work=str(directory / "work") if record.work == places.DISK else "",
        work_size=limits.work_size if record.work == places.MEMORY else None,
        tmp_size=limits.tmp_size,
        seccomp=calls,
        protect=PROTECTIONS,
    )


def _segment_bytes(output_limit: int | None, configured: int) -> int:
    """An eighth of the limit at most, because segments are dropped whole; a 64th at least, because the shim counts each."""
    if output_limit is None:
        return configured
    return max(min(output_limit // 8, configured), output_limit // 64)


class LauncherLost(JobRunnerError):
    """The launcher went without a word: what became of the start is not known."""


class ShimHandle:
    """The writing end of a shim's `ctl`: it tells the shim to look, and tells us when the shim is gone."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._gone = asyncio.Event()
        try:
            # A FIFO's writing end without a reader polls as an error, which the loop gives to its readers (poll(2)).
            self._loop.add_reader(fd, self._on_gone)
        except OSError:
            os.close(fd)
            raise

    @classmethod
    def open(cls, directory: Path) -> Self | None:
        """The handle on a job's shim; None if no shim is there any more (ENXIO, fifo(7)). OSError says nothing about the shim."""
        try:
            # What is no FIFO is not written to: a link is ELOOP, and a regular file cannot be polled (EPERM, epoll_ctl(2)).
            return cls(os.open(directory / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW))
        except OSError as exc:
            if exc.errno in (errno.ENXIO, errno.ENOENT):
                return None
            raise

    def send(self, line: bytes) -> None:
        """Write one line, whole or not at all; a shim that is gone, or has a full pipe of lines to look at, needs no more."""
        if self._fd >= 0:
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(self._fd, line)

    async def gone(self) -> None:
        """Wait until the shim is gone."""
        await self._gone.wait()

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_gone(self) -> None:
        self._loop.remove_reader(self._fd)
        self._gone.set()
