"""Whether a job can be born here: rights, kernel, the helper, and each step of a birth tried by the helper itself."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from jobrunner.errors import HostError
from jobrunner.linux import check_user
from jobrunner.linux.finding import Finding, Level, Needs, from_error
from jobrunner.linux.remedies import NEEDED, SHIM, capabilities, of_step
from jobrunner.linux.seccomp import compile_filter
from jobrunner.linux.user import is_root

__all__ = ["quick"]

PROC = Path("/proc")
KERNEL = (5, 12)
"""mount_setattr(2); close_range(2) with CLOSE_RANGE_CLOEXEC is of 5.11, CLONE_INTO_CGROUP of 5.7."""
PROBE = re.compile(r"(\S+) (?:started|failed (\S+) (\d+) (.*))")
NAMESPACES = ("pid", "mount", "network", "ipc", "uts", "cgroup")

_TITLES = {"clone3": "clone3", "proc": "fresh /proc", "root": "root of its own", "seccomp": "seccomp", "pivot": "pivot_root"}
_WORKS = {"clone3": "works", "proc": "can be mounted", "root": "can be entered", "seccomp": "a filter can be set", "pivot": "works"}
READ = ("self/status", "self/mountinfo", "self/cgroup", "self/uid_map", "meminfo", "swaps")
"""Of /proc, what a server cannot do without."""


def quick(needs: Needs) -> Iterator[Finding]:
    """What decides whether a job can be born at all: a few milliseconds, no trace. Later ones mean little where one is missing."""
    if sys.platform != "linux":
        yield Finding(Level.MISSING, "system", f"this is {sys.platform}", "jobs need Linux; SDK and CLI run here")
        return
    proc = _proc()
    if proc is not None:
        yield proc  # and nothing else: whatever is looked at next is found there
        return
    rights = ""
    if is_root():
        yield Finding(Level.OK, "root", "effective user id 0")
        found = _capabilities()
        yield found
        rights = found.remedy
        yield _job_uids(needs.job_uids)
    else:
        yield check_user.user()
        yield check_user.job_uids(needs)
    yield _kernel()
    yield _seccomp()
    shim = _shim(needs.shim)
    yield shim
    if shim.level is Level.OK:
        yield from _probes(needs.shim, rights)


def _proc() -> Finding | None:
    """What is not to be read of /proc; None if all is there."""
    for name in READ:
        try:
            (PROC / name).read_bytes()
        except OSError as exc:
            remedy = (
                "mount -t proc proc /proc, without subset=pid; docker: no volume on /proc; systemd: no ProcSubset=pid, no "
                "InaccessiblePaths=/proc"
            )
            return Finding(Level.MISSING, "/proc", f"{PROC / name} cannot be read: {exc.strerror}", remedy)
    return None


def _capabilities() -> Finding:
    status = (PROC / "self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    lacking = [name for name, number in NEEDED.items() if not effective >> number & 1]
    if lacking:
        return Finding(Level.MISSING, "capabilities", f"{' and '.join(lacking)} not there", capabilities(lacking))
    return Finding(Level.OK, "capabilities", " ".join(NEEDED))


def _kernel() -> Finding:
    release = os.uname().release
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) >= KERNEL:
        return Finding(Level.OK, "kernel", f"Linux {release}")
    wanted = ".".join(map(str, KERNEL))
    return Finding(
        Level.MISSING, "kernel", f"Linux {release} is older than {wanted}", "Debian 12, Ubuntu 22.04, RHEL 9 and later have it"
    )


def _seccomp() -> Finding:
    """Whether the filter that every job has can be compiled."""
    try:
        size = len(compile_filter())
    except HostError as exc:
        return from_error("libseccomp", exc)
    return Finding(Level.OK, "libseccomp", f"a filter of {size // 8} instructions")


def _job_uids(wanted: tuple[int, int]) -> Finding:
    """Whether the uids and gids of jobs are there in this user namespace (user_namespaces(7))."""
    first, last = wanted[0], wanted[0] + wanted[1] - 1
    for name in ("uid_map", "gid_map"):
        lines = [[int(word) for word in line.split()] for line in (PROC / "self" / name).read_text().splitlines()]
        if not any(inside <= first and last < inside + count for inside, _, count in lines):
            there = ", ".join(f"{inside} to {inside + count - 1}" for inside, _, count in lines)
            remedy = 'job_uids = "FIRST:COUNT" in the configuration, within them and of nobody else'
            return Finding(
                Level.MISSING, "job uids", f"{first} to {last} are not all in /proc/self/{name}, which has {there}", remedy
            )
    return Finding(Level.OK, "job uids", f"{first} to {last}")


def _shim(path: Path) -> Finding:
    if not path.is_file():
        return Finding(Level.MISSING, "shim", f"{path} is not there", SHIM)
    if not os.access(path, os.X_OK):
        return Finding(Level.MISSING, "shim", f"{path} cannot be executed", f"{SHIM}; not on a file system mounted noexec")
    return Finding(Level.OK, "shim", str(path))


def _probes(shim: Path, rights: str) -> Iterator[Finding]:
    """What the shim itself says when it tries the steps of a birth; `rights` is the remedy if a capability lacks."""
    try:
        done = subprocess.run([shim, "probe"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError) as exc:
        yield Finding(Level.MISSING, "shim", f"{shim}: {exc}", SHIM)
        return
    tried = {match[1]: match for line in done.stdout.splitlines() if (match := PROBE.fullmatch(line))}
    for name in ("clone3", *(() if is_root() else ("user",)), *NAMESPACES, "proc", "root", "seccomp"):
        title = _TITLES.get(name, f"namespace {name}")
        match = tried.get(name)
        if match is None:
            yield Finding(Level.MISSING, title, f"{shim} does not answer", SHIM)
        elif match[2] is None:
            yield Finding(Level.OK, title, _WORKS.get(name, "can be made"))
        else:
            yield Finding(Level.MISSING, title, _what(match), _remedy(match, name, rights))
    yield _pivot(tried.get("pivot"), rights)
    yield _keyring(tried.get("keyring"))
    if is_root():
        yield _user_namespaces(tried.get("user"), rights)


def _remedy(tried: re.Match[str], name: str, rights: str) -> str:
    step, error = tried[2], int(tried[3])
    # ENOSYS: Docker's own filter says that of clone3 without CAP_SYS_ADMIN, and lets it pass with it.
    if rights and error in (errno.EPERM, errno.ENOSYS):
        return rights
    in_user_namespace = name == "user" or not is_root()
    return (check_user.remedy(step, error) if in_user_namespace else "") or of_step(step, error, name)


def _what(match: re.Match[str]) -> str:
    """A report of the shim's, for people."""
    error = int(match[3])
    return ": ".join(part for part in (match[2], match[4], os.strerror(error) if error else "") if part)


def _pivot(tried: re.Match[str] | None, rights: str) -> Finding:
    """pivot_root(2): without it the host's root stays mounted below the job's (shim/root.c, enter_root)."""
    if tried is None or tried[2] is None:
        return Finding(Level.OK, "pivot_root", "works")
    if tried[2] != "pivot":
        return Finding(Level.LIMITED, "pivot_root", f"could not be tried: {_what(tried)}", _remedy(tried, "mount", rights))
    what = f"{_what(tried)}: a job's root is entered by chroot, and the one before stays mounted below it, out of its reach"
    if int(tried[3]) == errno.EACCES:  # nor is another way gone then (shim/root.c, enter_root): "root of its own" says so
        return Finding(Level.LIMITED, "pivot_root", _what(tried), of_step("pivot", errno.EACCES))
    if int(tried[3]) == errno.EINVAL:
        remedy = "a root that is not the kernel's first file system: switch_root(8)"
    else:
        remedy = "docker, podman: --security-opt seccomp=PROFILE, Docker's own and pivot_root allowed, or seccomp=unconfined"
    return Finding(Level.LIMITED, "pivot_root", what, f"{remedy}; it may as well stay so, because no job has CAP_SYS_CHROOT")


def _keyring(tried: re.Match[str] | None) -> Finding:
    """keyrings(7): a session keyring of the job's own, unless nobody here can use keys at all (shim/identity.c, new_keyring)."""
    if tried is None or tried[2] is None:
        return Finding(Level.OK, "keyring", "each job has one of its own")
    error = int(tried[3])
    if error in (errno.EPERM, errno.ENOSYS):
        return Finding(Level.OK, "keyring", "keyctl is denied here, to jobs as well")
    return Finding(Level.MISSING, "keyring", _what(tried), of_step(tried[2], error))


def _user_namespaces(tried: re.Match[str] | None, rights: str) -> Finding:
    """user_namespaces(7): for root what ids are mapped by, for volumes and workspaces whose files are another's."""
    if tried is None or tried[2] is None:
        return Finding(Level.OK, "user namespaces", "can be made, for volumes and workspaces whose files are another's")
    what = f"{_what(tried)}: no volume or workspace whose files are another's can be given to jobs"
    return Finding(Level.LIMITED, "user namespaces", what, _remedy(tried, "user", rights))
