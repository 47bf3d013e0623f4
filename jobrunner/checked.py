"""How one setting is read, from whichever place it comes: a text of the environment or the command line, or a value of TOML.

Each function gives the value, or raises ValueError with what is wrong with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobrunner.job import OutputPolicy
from jobrunner.units import parse_address, parse_duration, parse_size

CGROUP_LIMITS = ("cpus", "memory", "pids", "read_bps", "write_bps", "read_iops", "write_iops")
"""The limits that a cgroup holds: a host may lack one of them."""
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
LOG_LEVELS = ("debug", "info", "warning", "error")


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    if "\0" in value:
        raise ValueError("has a NUL")
    return value


def path(value: object) -> Path:
    name = os.fspath(value) if isinstance(value, Path) else text(value)
    if not name:
        raise ValueError("is empty")
    return Path(name)


def listen(value: object) -> str:
    parse_address(text(value))
    return text(value)


def number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a number") from None


def whole(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def size(value: object) -> int:
    return parse_size(value) if isinstance(value, str) else whole(value)


def seconds(value: object) -> float:
    return parse_duration(value) if isinstance(value, str) else number(value)


def flag(value: object) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    found = known.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return found


def names(value: object) -> tuple[str, ...]:
    found = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        raise ValueError(f"{value!r} is not a list of names")
    return tuple(map(text, found))


def host_names(value: object) -> tuple[str, ...]:
    found = names(value)
    for name in found:
        if not _HOST_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a host")
    return found


def limit_names(value: object) -> tuple[str, ...]:
    found = names(value)
    for name in found:
        if name not in CGROUP_LIMITS:
            raise ValueError(f"{name!r} is none of {', '.join(CGROUP_LIMITS)}")
    return found


def id_range(value: object) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text(value))
    if not found:
        raise ValueError(f"{value!r} is not FIRST:COUNT")
    first, count = int(found[1]), int(found[2])
    if first < 1 or count < 1 or first + count > 0xFFFFFFFF:
        raise ValueError(f"{value!r} is no range of ids; root's is not for jobs")
    return first, count


def host_paths(value: object) -> tuple[str, ...]:
    paths = value.split(":") if isinstance(value, str) else value
    if not isinstance(paths, list | tuple):
        raise ValueError(f"{value!r} is not a list of paths")
    for path in paths:
        if text(path) != os.path.normpath(path) or not path.startswith("/") or path in ("/", "//"):
            raise ValueError(f"{path!r} is not an absolute path below /, in its plainest form")
    return tuple(paths)


def log_level(value: object) -> str:
    if text(value).lower() not in LOG_LEVELS:
        raise ValueError(f"{value!r} is none of {', '.join(LOG_LEVELS)}")
    return text(value).lower()


def word(*words: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if text(value) not in words:
            raise ValueError(f"{value!r} is none of {', '.join(words)}")
        return text(value)

    return read


def output_policy(value: object) -> OutputPolicy:
    return OutputPolicy(word(*OutputPolicy)(value))


def between(convert: Callable[[object], Any], low: float, high: float) -> Callable[[object], Any]:
    def read(value: object) -> Any:
        number = convert(value)
        if not low <= number <= high:
            raise ValueError(f"{value} is not between {low} and {high}")
        return number

    return read


def or_none(convert: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value == "none" else convert(value)
