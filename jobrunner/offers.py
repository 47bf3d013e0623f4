"""What the configuration offers to jobs by name, root file systems, volumes and users, and how its tables are read.

    [roots]                                         # --root alpine
    alpine = "/srv/roots/alpine"
    [volumes]                                       # --volume cache, --volume sources:ro
    sources = {path = "/srv/sources", read_only = true}
    cache = {path = "/srv/cache", owner = "ci:ci"}
    [users]                                         # --user ci
    ci = "ci"
    release = {id = "1501:1500", for = ["alice"]}

Paths are not looked at here: a directory may be mounted later than the server starts. That a volume's leads through no symbolic
link is seen to when a job starts (shim/volume.c), so what is said here of paths holds of the directories.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from jobrunner.errors import ConfigError
from jobrunner.spec import is_name

__all__ = ["TABLES", "Offers", "Owner", "User", "Volume"]

T = TypeVar("T")
MAX_ID = (1 << 32) - 2
"""All ones means no id: chown(2)."""
KEEP = "keep"
MAX_USER = 32
"""Longest name of a user: useradd(8)."""


class Owner(NamedTuple):
    """Who a file belongs to."""

    uid: int
    gid: int

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}"


@dataclass(frozen=True, slots=True)
class Volume:
    """A directory of the host's that jobs may ask for."""

    path: Path
    read_only: bool = False
    owner: Owner | None = None
    """Whose files are the job's: it reads and writes them as this owner. None: the owner of the directory, if that is not root."""
    keep_owners: bool = False
    """Files keep their owners: to the job they are a stranger's. For file systems that cannot map ids."""


@dataclass(frozen=True, slots=True)
class User:
    """A user that jobs may ask to be, instead of one that no other job is."""

    id: Owner
    callers: tuple[str, ...] | None = None
    """Who may ask for it: CNs of clients' certificates. None: everyone who may start jobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """All that the configuration offers by name."""

    roots: Mapping[str, Path] = field(default_factory=dict)
    volumes: Mapping[str, Volume] = field(default_factory=dict)
    users: Mapping[str, User] = field(default_factory=dict)

    def check(self, state_dir: Path, show: Iterable[str]) -> None:
        """Raise ConfigError for what jobs could take away from under others.

        A job that writes to a volume may put a link where a directory was, and the next one would be given where that leads.
        """
        given = [(f"volumes: {name}", volume.path) for name, volume in self.volumes.items()]
        given += [(f"roots: {name}", path) for name, path in self.roots.items()] + [("show", Path(path)) for path in show]
        for name, volume in self.volumes.items():
            if _is_below(state_dir, volume.path) or _is_below(volume.path, state_dir):
                raise ConfigError("configuration", f"volumes: {name}: the state directory, {state_dir}, is the server's alone")
            for what, path in [] if volume.read_only else given:
                if path != volume.path and _is_below(path, volume.path):
                    raise ConfigError("configuration", f"{what}: {path} is below volume {name}, which jobs write to")


def _is_below(path: Path, other: Path) -> bool:
    """Or the same."""
    return Path(os.path.normpath(path)).is_relative_to(os.path.normpath(other))


def _volume(value: object) -> Volume:
    if isinstance(value, str):
        return Volume(_directory(value))
    if not isinstance(value, dict):
        raise ValueError("is neither a path nor a table with path, read_only, owner")
    if unknown := set(value) - {"path", "read_only", "owner"}:
        raise ValueError(f"{sorted(unknown)[0]}: is not known")
    if "path" not in value:
        raise ValueError("path: is not set")
    read_only = value.get("read_only", False)
    if not isinstance(read_only, bool):
        raise ValueError(f"read_only: {read_only!r} is neither true nor false")
    kept = value.get("owner") == KEEP
    owner = _owner(value["owner"]) if "owner" in value and not kept else None
    if owner is not None and 0 in owner and not read_only:
        raise ValueError(f"owner: {owner} is root, and a job must not write files of root's: it could make them setuid")
    return Volume(_directory(value["path"], "path: "), read_only, owner, kept)


def _user(value: object) -> User:
    if isinstance(value, str):
        value = {"id": value}
    if not isinstance(value, dict):
        raise ValueError("is neither UID:GID nor a table with id, for")
    if unknown := set(value) - {"id", "for"}:
        raise ValueError(f"{sorted(unknown)[0]}: is not known")
    if "id" not in value:
        raise ValueError("id: is not set")
    found, callers = _owner(value["id"]), value.get("for")
    if 0 in found:
        raise ValueError(f"id: {found} is root, and no job is")
    if callers is not None and not (isinstance(callers, list) and all(isinstance(name, str) for name in callers)):
        raise ValueError(f"for: {callers!r} is not a list of users")
    return User(found, None if callers is None else tuple(callers))


def _directory(value: object, where: str = "") -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(f"{where}{value!r} is not an absolute path")
    return Path(value)


def _owner(value: object) -> Owner:
    """`UID:GID` as numbers or names of this host; `NAME` is a user with its own group."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not UID:GID")
    user, colon, group = value.partition(":")
    if not colon and not _is_number(user):
        try:
            entry = pwd.getpwnam(user)
        except (KeyError, ValueError):
            raise ValueError(f"{user!r} is no user of this host") from None
        return Owner(entry.pw_uid, entry.pw_gid)
    if not colon:
        raise ValueError(f"{value!r} has no group: UID:GID, or the name of a user of this host")
    return Owner(
        _id(user, lambda name: pwd.getpwnam(name).pw_uid, "user"), _id(group, lambda name: grp.getgrnam(name).gr_gid, "group")
    )


def _id(text: str, look_up: Callable[[str], int], kind: str) -> int:
    try:
        number = int(text) if _is_number(text) else look_up(text)
    except (KeyError, ValueError):
        raise ValueError(f"{text!r} is no {kind} of this host") from None
    if number > MAX_ID:
        raise ValueError(f"{text} is more than {MAX_ID}")
    return number


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10


def _table(read: Callable[[object], T], longest: int = 128) -> Callable[[object], dict[str, T]]:
    """The reader of a table of names. Raises ValueError that begins with the name."""

    def table(value: object) -> dict[str, T]:
        if not isinstance(value, dict):
            raise ValueError("is not a table")
        found = {}
        for name, one in value.items():
            if not is_name(name):
                raise ValueError(f"{name!r} is no name of A-Z a-z 0-9 _ . - from a letter or digit on")
            if len(name) > longest:
                raise ValueError(f"{name!r} is longer than {longest}")
            try:
                found[name] = read(one)
            except ValueError as exc:
                raise ValueError(f"{name}: {exc}") from None
        return found

    return table


TABLES: Mapping[str, Callable[[object], Mapping[str, object]]] = {
    "roots": _table(_directory),
    "volumes": _table(_volume),
    "users": _table(_user, MAX_USER),
}
"""The tables of the configuration file, by the names of `Offers`' fields."""
