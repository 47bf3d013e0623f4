"""Whether a job can be born here: rights, kernel, the helper, and each step of a birth tried by the helper itself."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jobrunner.errors import HostError
from jobrunner.linux import check_user
from jobrunner.linux.finding import Finding, Level, Needs, from_error
from jobrunner.linux.seccomp import compile_filter
from jobrunner.linux.user import is_root

__all__ = ["quick"]

NEEDED = {
    "CAP_SYS_ADMIN": 21,
    "CAP_NET_ADMIN": 12,
    "CAP_SETUID": 7,
    "CAP_SETGID": 6,
    "CAP_SETPCAP": 8,
    "CAP_KILL": 5,
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
}
"""capabilities(7): namespaces and mounts; a job's loopback interface; its uid, its gid, its empty bounding set; signals to it; its
pipes and its work directory given to it; what it left there removed."""
KERNEL = (5, 12)
"""mount_setattr(2); close_range(2) with CLOSE_RANGE_CLOEXEC is of 5.11, CLONE_INTO_CGROUP of 5.7."""
PROBE = re.compile(r"(\S+) (?:started|failed (\S+) (\d+) (.*))")
NAMESPACES = ("pid", "mount", "network", "ipc", "uts", "cgroup")

_NAMES = [name.removeprefix("CAP_") for name in NEEDED]
_CAPABILITIES = (
    f"docker: {' '.join(f'--cap-add {name}' for name in _NAMES)}; compose: cap_add: [{', '.join(_NAMES)}]; "
    f"systemd: CapabilityBoundingSet= must hold {' '.join(NEEDED)}"
)
_FILTER = (
    "docker: --cap-add SYS_ADMIN --security-opt seccomp=unconfined; "
    "compose: cap_add: [SYS_ADMIN], security_opt: [seccomp:unconfined]; systemd: no SystemCallFilter=, no RestrictNamespaces="
)
_APPARMOR = (
    "docker: --security-opt apparmor=unconfined; compose: security_opt: [apparmor:unconfined]; systemd: no AppArmorProfile= that "
    "denies mount"
)
_PROC = (
    "the outer /proc is masked: docker: --security-opt systempaths=unconfined; compose: security_opt: [systempaths:unconfined]; "
    "podman: --security-opt unmask=ALL; systemd: no ProtectKernelTunables=, ProtectProc= or ProcSubset="
)
_SHIM = "reinstall jobrunner on Linux with a C compiler (apt-get install gcc libc6-dev), or run `make shim` in the checkout"


def quick(needs: Needs) -> Iterator[Finding]:
    """What decides whether a job can be born at all: a few milliseconds, no trace. Later ones mean little where one is missing."""
    if sys.platform != "linux":
        yield Finding(Level.MISSING, "system", f"this is {sys.platform}", "jobs need Linux; SDK and CLI run here")
        return
    rights = ""
    if is_root():
        yield Finding(Level.OK, "root", "effective user id 0")
        capabilities = _capabilities()
        yield capabilities
        rights = capabilities.remedy
        yield _job_uids(needs.job_uids)
    else:
        yield check_user.user()
    yield _kernel()
    yield _seccomp()
    shim = _shim(needs.shim)
    yield shim
    if shim.level is Level.OK:
        yield from _probes(needs.shim, rights)


def _capabilities() -> Finding:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    lacking = [name for name, number in NEEDED.items() if not effective >> number & 1]
    if lacking:
        return Finding(Level.MISSING, "capabilities", f"{' and '.join(lacking)} not there", _CAPABILITIES)
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
        lines = [[int(word) for word in line.split()] for line in Path("/proc/self", name).read_text().splitlines()]
        if not any(inside <= first and last < inside + count for inside, _, count in lines):
            there = ", ".join(f"{inside} to {inside + count - 1}" for inside, _, count in lines)
            remedy = 'job_uids = "FIRST:COUNT" in the configuration, within them and of nobody else'
            return Finding(
                Level.MISSING, "job uids", f"{first} to {last} are not all in /proc/self/{name}, which has {there}", remedy
            )
    return Finding(Level.OK, "job uids", f"{first} to {last}")


def _shim(path: Path) -> Finding:
    if not path.is_file():
        return Finding(Level.MISSING, "shim", f"{path} is not there", _SHIM)
    if not os.access(path, os.X_OK):
        return Finding(Level.MISSING, "shim", f"{path} cannot be executed", f"{_SHIM}; not on a file system mounted noexec")
    return Finding(Level.OK, "shim", str(path))


def _probes(shim: Path, rights: str) -> Iterator[Finding]:
    """What the shim itself says when it tries the steps of a birth; `rights` is the remedy if a capability lacks."""
    try:
        done = subprocess.run([shim, "probe"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError) as exc:
        yield Finding(Level.MISSING, "shim", f"{shim}: {exc}", _SHIM)
        return
    tried = {match[1]: match for line in done.stdout.splitlines() if (match := PROBE.fullmatch(line))}
    for name in ("clone3", *(() if is_root() else ("user",)), *NAMESPACES, "proc"):
        title = {"clone3": "clone3", "proc": "fresh /proc"}.get(name, f"namespace {name}")
        match = tried.get(name)
        if match is None:
            yield Finding(Level.MISSING, title, f"{shim} does not answer", _SHIM)
        elif match[2] is None:
            yield Finding(Level.OK, title, {"clone3": "works", "proc": "can be mounted"}.get(name, "can be made"))
        else:
            found = _probe_failed(name, title, match[2], int(match[3]), match[4])
            # ENOSYS: Docker's own filter says that of clone3 without CAP_SYS_ADMIN, and lets it pass with it.
            yield replace(found, remedy=rights) if rights and int(match[3]) in (errno.EPERM, errno.ENOSYS) else found


def _probe_failed(name: str, title: str, step: str, error: int, detail: str) -> Finding:
    what = ": ".join(part for part in (step, detail, os.strerror(error) if error else "") if part)
    if not is_root() and (of_user := check_user.remedy(step, error)):
        remedy = of_user
    elif step == "mount" and error == errno.EACCES:
        remedy = _APPARMOR
    elif step == "mount" and name == "proc":
        remedy = _PROC
    elif step == "network":
        remedy = _CAPABILITIES
    elif error == errno.ENOSPC:
        remedy = f"sysctl -w user.max_{'net' if name == 'network' else 'mnt' if name == 'mount' else name}_namespaces=65536"
    elif error == errno.EINVAL:
        remedy = f"a kernel that is built with this namespace (CONFIG_{'NET' if name == 'network' else name.upper()}_NS=y)"
    else:
        remedy = _FILTER
    return Finding(Level.MISSING, title, what, remedy)
