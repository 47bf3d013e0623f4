"""The host's bounds on many jobs at once, what security modules say, and whose life a job's life is bound to."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jobrunner.linux.disk import MEMORY
from jobrunner.linux.finding import Finding, Level, Needs, existing, number
from jobrunner.linux.mountinfo import cgroup_mounts, mount_of, own_cgroups, read_mountinfo
from jobrunner.linux.remedies import capabilities
from jobrunner.linux.user import in_user_namespace

__all__ = ["bounds"]

CAP_SYS_RESOURCE = 24
INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""Its inode in every kernel: PROC_PID_INIT_INO of include/linux/proc_ns.h."""
PROCESSES_PER_JOB = 3
FILES = 600
"""Open files of a server besides one for each running job: connections, the segments of their logs, itself."""
SYSCTL = Path("/proc/sys")


def bounds(needs: Needs) -> Iterator[Finding]:
    """One line each."""
    yield _state_dir(needs.state_dir)
    yield _inotify(needs)
    yield _open_files(needs)
    yield _processes(needs)
    yield _lifetime()
    yield _apparmor()
    yield _core_dumps()
    yield _out_of_memory()


def _state_dir(path: Path) -> Finding:
    there = existing(path)
    try:  # there are file systems that access(2) calls writable, and that take no directory: proc(5)
        Path(tempfile.mkdtemp(prefix=".jobrunner-check-", dir=there)).rmdir()
    except OSError as exc:
        remedy = "another --state-dir; docker, podman: a volume, -v jobrunner:/var/lib/jobrunner; systemd: StateDirectory=jobrunner"
        return Finding(Level.MISSING, "state directory", f"{path}: {there} cannot be written to: {exc.strerror}", remedy)
    aside = [name for name in _names(path / "corrupt") if not name.endswith(".why")]
    if aside:
        what = f"{path}: {len(aside)} files or directories in it were damaged or not jobrunner's, {min(aside)} for instance"
        return Finding(Level.LIMITED, "state directory", what, f"see {path}/corrupt/*.why, then remove them")
    mount = mount_of(os.path.realpath(there), read_mountinfo())
    if mount is not None and mount.fstype in MEMORY:
        what = f"{path} is on {mount.fstype}: jobs and their output are lost with the machine's memory"
        return Finding(Level.LIMITED, "state directory", what, "a --state-dir on a disk; docker, podman: a named volume")
    return Finding(Level.OK, "state directory", f"{path}, on {mount.fstype if mount else 'an unknown file system'}")


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _inotify(needs: Needs) -> Finding:
    """inotify(7): one instance, and a watch for each log that is followed."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    if fd < 0:
        reason = os.strerror(ctypes.get_errno())
        return Finding(Level.MISSING, "inotify", f"no instance: {reason}", "sysctl -w user.max_inotify_instances=512")
    os.close(fd)
    watches = number(SYSCTL / "user/max_inotify_watches")
    if watches is not None and watches < needs.max_running:
        what = f"{watches} watches, for max_running = {needs.max_running} jobs whose logs may be followed"
        return Finding(Level.LIMITED, "inotify", what, "sysctl -w user.max_inotify_watches=65536")
    return Finding(Level.OK, "inotify", "an instance can be made" + (f", {watches} watches" if watches is not None else ""))


def _open_files(needs: Needs) -> Finding:
    """getrlimit(2) RLIMIT_NOFILE."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needs.max_running + FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        remedy = (
            f"ulimit -n {wanted}; docker, podman: --ulimit nofile={wanted}; compose: ulimits: {{nofile: {wanted}}}; systemd: "
            f"LimitNOFILE={wanted}"
        )
        return Finding(Level.LIMITED, "open files", f"{soft}, about {wanted} for max_running = {needs.max_running}", remedy)
    return Finding(Level.OK, "open files", "no limit" if soft == resource.RLIM_INFINITY else str(soft))


def _processes(needs: Needs) -> Finding:
    wanted = needs.max_running * PROCESSES_PER_JOB + 1000
    most = number(SYSCTL / "kernel/pid_max") or wanted
    if most < wanted:
        remedy = f"sysctl -w kernel.pid_max={max(wanted, 32768)}"
        return Finding(Level.LIMITED, "processes", f"kernel.pid_max is {most}, about {wanted} for max_running", remedy)
    here = _tightest_pids()
    if here is not None and here < wanted - 1000:
        what = f"this cgroup allows {here}, about {wanted - 1000} for max_running = {needs.max_running}"
        remedy = "docker, podman: --pids-limit -1; compose: pids_limit: -1; systemd: TasksMax=infinity"
        return Finding(Level.LIMITED, "processes", what, remedy)
    return Finding(Level.OK, "processes", f"kernel.pid_max is {most}")


def _tightest_pids() -> int | None:
    """The least pids.max of this process's cgroup and those above it, as far as they can be seen."""
    mounts, own = cgroup_mounts(), own_cgroups()
    name = "pids" if "pids" in mounts else ""
    if name not in mounts:
        return None
    found = []
    directory = Path(mounts[name].directory(own.get(name, "/")))
    while directory.is_relative_to(mounts[name].point):
        found.append(number(directory / "pids.max"))
        directory = directory.parent
    return min((number for number in found if number is not None), default=None)


def _lifetime() -> Finding:
    """Whether jobs outlive the server: not where its end ends its PID namespace (pid_namespaces(7))."""
    try:
        initial = Path("/proc/self/ns/pid").stat().st_ino == INITIAL_PID_NAMESPACE
    except OSError:
        initial = True
    if initial:
        return Finding(Level.OK, "lifetime", "jobs run on while the server is away (systemd: with KillMode=process)")
    what = "this is a container's PID namespace: jobs end with it, when its pid 1 does"
    return Finding(Level.LIMITED, "lifetime", what, "run jobrunnerd on the host; systemd: Delegate=yes, KillMode=process")


def _apparmor() -> Finding:
    """For information: what AppArmor denies was found by trying."""
    with contextlib.suppress(OSError):
        profile = Path("/proc/self/attr/apparmor/current").read_text().strip().rstrip("\0")
        return Finding(Level.OK, "apparmor", f"profile {profile}")
    return Finding(Level.OK, "apparmor", "not in use")


def _core_dumps() -> Finding:
    """core(5). A pattern that is a pipe is run as root of the host; not for jobs (shim/command.c, seccomp.py)."""
    try:
        pattern = (SYSCTL / "kernel/core_pattern").read_text().strip()
    except OSError:
        pattern = ""
    if pattern.startswith("@"):
        what = f"kernel.core_pattern is a socket: its service hears of each job that crashes, which no limit hinders ({pattern})"
        return Finding(Level.LIMITED, "core dumps", what, "sysctl kernel.core_pattern=core, or a pipe")
    more = f", nor starts {pattern[1:].split(' ')[0]}" if pattern.startswith("|") else ""
    return Finding(Level.OK, "core dumps", f"a job that crashes leaves none{more}")


def _out_of_memory() -> Finding:
    """proc_pid_oom_score_adj(5): what a process with CAP_SYS_RESOURCE sets, one without it cannot set lower again."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    first = "when the host is out of memory jobs go before the host's own (oom_score_adj 500)"
    if found and int(found[1], 16) >> CAP_SYS_RESOURCE & 1 and not in_user_namespace():
        return Finding(Level.OK, "out of memory", first)
    remedy = f"{capabilities(['CAP_SYS_RESOURCE'])}; its limit of memory bounds it all the same"
    return Finding(Level.LIMITED, "out of memory", f"{first}, unless a job sets that back to 0", remedy)
