"""Attacks on the root: can anything of the host be reached from it? `mark` is a file of the host's, by its absolute path."""

from __future__ import annotations

import os

from tests.hostile.inside.base import LIBC, Contained, attack, check

MNT_DETACH = 2
DEPTH = 64


def up() -> None:
    """As far up as `..` leads."""
    for _ in range(DEPTH):
        os.chdir("..")


def look_for(mark: str, how: str) -> str:
    if not os.path.exists(mark.lstrip("/")):
        raise Contained("not there")
    return how


@attack
def climb(mark: str) -> str:
    """Up from every directory that is ours, pid 1's, or open."""
    places = ["/", ".", *(f"/proc/{pid}/{what}" for pid in ("self", "1") for what in ("cwd", "root"))]
    places += [f"/proc/{pid}/fd/{fd}" for pid in ("self", "1") for fd in range(256)]
    for place in places:
        try:
            os.chdir(place)
            up()
            return look_for(mark, f"from {place}")
        except (OSError, Contained):
            continue
    raise Contained("not there")


@attack
def break_out(mark: str) -> str:
    """A root below where we stand does not stop `..` (chroot(2))."""
    os.makedirs("/tmp/cage", exist_ok=True)
    os.chdir("/")
    os.chroot("/tmp/cage")
    up()
    os.chroot(".")
    return look_for(mark, "out")


@attack
def uncover(mark: str) -> str:
    """Take the root off what it was mounted over, and enter the mount namespace anew, whose root is the first one again."""
    with open("/proc/self/ns/mnt", "rb") as namespace:
        check(LIBC.umount2(b"/", MNT_DETACH))
        check(LIBC.setns(namespace.fileno(), 0))
    up()
    return look_for(mark, "uncovered")
