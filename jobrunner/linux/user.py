"""Who this server is: root, or an ordinary user, whose jobs have user namespaces (docs/rootless.md)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["give", "identity", "in_user_namespace", "is_root"]


def is_root() -> bool:
    """Whether jobs can have any uid of this host's."""
    return os.geteuid() == 0


def in_user_namespace() -> bool:
    """Whether this is no host's own user namespace but one below, as in a rootless container: its root is an ordinary user's."""
    try:
        lines = Path("/proc/self/uid_map").read_text().split()
    except OSError:
        return False
    return lines != ["0", "0", str(0xFFFFFFFF)]


def give(directory: Path, uid: int, gid: int) -> None:
    """It becomes a job's. Without root nothing is to be done: either it is, or the shim gives it away. Raises OSError."""
    if is_root():
        os.chown(directory, uid, gid)


def identity(own: bool) -> tuple[str, ...]:
    """What a job lacks of being a user of its own, for its info. `own`: it has a subordinate id of the server's user's."""
    if is_root() or own:
        return ()
    others = sorted(set(os.getgroups()) - {os.getegid()})
    lacking = [f"uid: on the host its processes and files are the server's own user's, uid {os.geteuid()}"]
    if others:
        lacking.append(f"groups: the server's user's other groups are the job's too: {', '.join(map(str, others))}")
    return tuple(lacking)
