"""Item lists (docs/formats.md): `key=value` items, each ended by a NUL, the first of which names the format and its version."""

from __future__ import annotations

from collections.abc import Iterable

from jobrunner.job import os_bytes

__all__ = ["pack_items", "parse_items"]


def pack_items(kind: str, items: Iterable[tuple[str, str]]) -> bytes:
    """The list as bytes. ValueError for a value with a NUL: it would be read as two items."""
    parts = [f"{kind}=1", *(f"{key}={value}" for key, value in items), ""]
    packed = os_bytes("\0".join(parts))
    if packed.count(b"\0") != len(parts) - 1:
        raise ValueError("an item must not contain a NUL byte")
    return packed


def parse_items(kind: str, raw: bytes) -> list[tuple[str, str]]:
    """The items of a list of this kind. ValueError if it is none, or is of another version."""
    first, *items = raw.decode("utf-8", "surrogateescape").split("\0")
    if first != f"{kind}=1" or items[-1:] != [""]:
        raise ValueError(f"not a {kind} list of version 1")
    pairs = [item.partition("=") for item in items[:-1]]
    return [(key, value) for key, _, value in pairs]
