"""The exact remedy for each step of a birth that fails: by the step and the kernel's reason, as shim and probe tell them."""

from __future__ import annotations

import errno
from collections.abc import Collection

__all__ = ["NEEDED", "SHIM", "capabilities", "of_step"]

NEEDED = {
    "CAP_SYS_ADMIN": 21,
    "CAP_NET_ADMIN": 12,
    "CAP_SETUID": 7,
    "CAP_SETGID": 6,
    "CAP_SETPCAP": 8,
    "CAP_KILL": 5,
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_SYS_CHROOT": 18,
}
"""capabilities(7): namespaces and mounts; a job's loopback interface; its uid, its gid, its empty bounding set; signals to it; its
pipes and its work directory given to it; what it left there removed, also from sticky directories; its root entered."""

SHIM = "reinstall jobrunner on Linux with a C compiler (apt-get install gcc libc6-dev), or run `make shim` in the checkout"

_FILTER = (
    "a filter of system calls around the server denies it: docker, podman: --cap-add SYS_ADMIN --security-opt seccomp=unconfined; "
    "compose: cap_add: [SYS_ADMIN], security_opt: [seccomp:unconfined]; systemd: no SystemCallFilter=, no RestrictNamespaces="
)
_APPARMOR = (
    "docker, podman: --security-opt apparmor=unconfined; compose: security_opt: [apparmor:unconfined]; systemd: no "
    "AppArmorProfile= that denies mount"
)
_PROC = (
    "the outer /proc is masked: docker: --security-opt systempaths=unconfined; compose: security_opt: [systempaths:unconfined]; "
    "podman: --security-opt unmask=ALL; systemd: no ProtectKernelTunables=, ProtectProc= or ProcSubset="
)
_TASKS = (
    "more processes: docker, podman: --pids-limit -1; systemd: TasksMax=infinity, LimitNPROC=infinity; ulimit -u; kernel.pid_max, "
    "kernel.threads-max"
)
_FULL = "make room on the file system of state_dir, of bytes and of inodes (df, df -i)"
_FILES = "ulimit -n 1600; docker, podman: --ulimit nofile=1600; systemd: LimitNOFILE=1600"
_OF_ERROR = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "more of the quota of the server's user on the file system of state_dir (quota -s)",
    errno.EMFILE: _FILES,
    errno.ENFILE: "sysctl -w fs.file-max=1000000",
    errno.ENOMEM: "more memory: docker, podman: --memory; systemd: MemoryMax=",
    errno.EFBIG: "ulimit -f unlimited; systemd: LimitFSIZE=infinity",
}
"""Of whichever step."""
_UNKNOWN = "no remedy is known for this: please report it, with `uname -a`"
_OF_NAMESPACES = {"network": "net", "mount": "mnt"}
"""What user.max_*_namespaces calls them, where that is not the name of the probe."""


def capabilities(lacking: Collection[str]) -> str:
    """What gives a server these capabilities."""
    names = [name.removeprefix("CAP_") for name in lacking]
    return (
        f"docker, podman: {' '.join(f'--cap-add {name}' for name in names)}; compose: cap_add: [{', '.join(names)}]; "
        f"systemd: CapabilityBoundingSet= must hold {' '.join(lacking)}"
    )


def of_step(step: str, error: int, what: str = "") -> str:
    """What mends a failure of this step with this errno (0 if no system call failed). `what`: which thing was tried."""
    if step in ("mount", "root", "mask", "pivot") and error == errno.EACCES:
        return _APPARMOR
    if step == "mount" and what in ("proc", "/proc") and error == errno.EPERM:
        return _PROC
    if error in _OF_ERROR and (step, error) not in _OF_STEP and step not in ("clone", "idmap"):
        return _OF_ERROR[error]
    if step == "clone" and error == errno.EAGAIN:
        return _TASKS
    if step in ("clone", "idmap") and error == errno.ENOSPC:
        name = "user" if step == "idmap" else _OF_NAMESPACES.get(what, what)
        return f"sysctl -w user.max_{name}_namespaces=65536"
    if step == "clone" and error == errno.EINVAL:
        return f"a kernel that is built with this namespace (CONFIG_{'NET' if what == 'network' else what.upper()}_NS=y)"
    known = _OF_STEP.get((step, error)) or _OF_STEP.get((step, None))
    return known or (_FILTER if error in (errno.EPERM, errno.ENOSYS) else _UNKNOWN)


_OF_STEP: dict[tuple[str, int | None], str] = {
    ("network", None): capabilities(("CAP_NET_ADMIN",)),
    ("uid", None): capabilities(("CAP_SETUID", "CAP_SETGID")),
    ("capabilities", None): capabilities(("CAP_SETPCAP",)),
    ("pivot", errno.EPERM): capabilities(("CAP_SYS_CHROOT",)),
    ("seccomp", errno.EINVAL): "a kernel with CONFIG_SECCOMP_FILTER=y",
    ("keyring", errno.EDQUOT): "sysctl -w kernel.keys.root_maxkeys=1000000 kernel.keys.root_maxbytes=25000000",
    ("volume", errno.ENOENT): "make the directory, or take it out of [volumes]",
    ("volume", 0): 'give the directory to another user, set owner = "UID:GID" in [volumes], or read_only = true',
    ("root", errno.ENOENT): "make the directory, or take it out of [roots]",
    ("exec", None): "a program `cat` in the job's PATH that it can execute: on a file system that is not mounted noexec",
}
