"""Whether a job can be born here for a server that is not root: who it is, and what keeps it from user namespaces."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from jobrunner.linux import subids
from jobrunner.linux.cgroup_none import LIMITS, NoCgroupHost, counts_tasks
from jobrunner.linux.finding import Finding, Level, Needs, number
from jobrunner.linux.kernfs import remedy as of_cgroups

__all__ = ["job_uids", "no_cgroups", "remedy", "user"]

SYSCTL = Path("/proc/sys")
_PROFILE = "`userns,` in the profile of AppArmor that is around the server, which `apparmor` below names, or none around it"
_OF_UIDS = (
    "apt-get install uidmap, dnf install shadow-utils; then, with numbers that nobody else has in /etc/subuid: usermod "
    "--add-subuids 100000-165535 --add-subgids 100000-165535 USER; systemd: no NoNewPrivileges=; docs/rootless.md"
)
_APPARMOR = (
    "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or a profile of AppArmor that lets jobrunner-shim have them: "
    "docs/rootless.md"
)


def user() -> Finding:
    """For information: what a server that is not root does instead."""
    what = f"effective user id {os.geteuid()}: jobs have user namespaces"
    return Finding(
        Level.LIMITED, "root", what, "for volumes and workspaces of others, and --user, start it with sudo; systemd: no User="
    )


def job_uids(needs: Needs) -> Finding:
    """Whether jobs have uids of their own on the host. Tried, because the helpers are set-uid, and not everywhere allowed to be."""
    try:
        ids = subids.of_jobs(needs.state_dir, needs.job_uids)
    except (LookupError, OSError) as exc:
        groups = ", with its other groups" if set(os.getgroups()) - {os.getegid()} else ""
        what = f"jobs are this user's own processes on the host, uid {os.geteuid()}{groups}: {exc}"
        return Finding(Level.LIMITED, "job uids", what, _OF_UIDS)
    what = f"{ids.first} to {ids.first + ids.count - 1}, of {subids.FILES[0]}; those with volumes or a workspace have this user's"
    return Finding(Level.OK, "job uids", what)


def remedy(step: str, error: int) -> str:
    """Of a probe that failed in a user namespace; empty if it is no other than root's would be. user_namespaces(7)."""
    if error == errno.ENOSPC and number(SYSCTL / "user/max_user_namespaces") == 0:
        return "sysctl -w user.max_user_namespaces=65536"
    if step == "clone" and error == errno.EPERM and number(SYSCTL / "kernel/unprivileged_userns_clone") == 0:
        return "sysctl -w kernel.unprivileged_userns_clone=1"
    if error in (errno.EPERM, errno.EACCES) and number(SYSCTL / "kernel/apparmor_restrict_unprivileged_userns"):
        return _APPARMOR
    if step == "clone" and error == errno.EACCES:  # no other than a security module says that
        return _PROFILE
    if step == "clone" and error == errno.EINVAL:
        return "a kernel that is built with user namespaces (CONFIG_USER_NS=y)"
    return ""


def no_cgroups(host: NoCgroupHost, needs: Needs) -> list[Finding]:
    """All that is not limited, in one line: it has one reason and one remedy."""
    lacking = [name for name in LIMITS if name != "pids" or not counts_tasks()]
    needed = [name for name in lacking if getattr(needs.defaults, name) is not None and name not in needs.allow_missing]
    names = ", ".join(f'"{name}"' for name in needed or lacking)
    what = f"{host.why}: no limit of {', '.join(needed or lacking)}"
    level = Level.MISSING if needed else Level.LIMITED
    return [Finding(level, "cgroup", what, f"{of_cgroups()}: allow_missing = [{names}]")]
