"""Who this server is: root, or an ordinary user, whose jobs have user namespaces (docs/rootless.md)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["give", "identity", "is_root"]


def is_root() -> bool:
    """Whether jobs can have uids of their own on this host."""
    return os.geteuid() == 0


def give(directory: Path, uid: int, gid: int) -> None:
    """It becomes a job's. Without root it is that already: the job's uid is then the server's own on the host. Raises OSError."""
    if is_root():
        os.chown(directory, uid, gid)


def identity() -> tuple[str, ...]:
    """What jobs lack of a uid of their own, for their info."""
    return () if is_root() else (f"uid: on the host its processes and files are the server's own user's, uid {os.geteuid()}",)
