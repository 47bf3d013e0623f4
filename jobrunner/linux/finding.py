"""What a check finds: one finding for each thing that a host offers or lacks, and the exact remedy for what it lacks."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jobrunner.errors import HostError
from jobrunner.identity import PROJECT_IDS
from jobrunner.job import Limits

__all__ = ["Finding", "Level", "Needs", "existing", "from_error", "looked", "number", "refuse"]


class Level(enum.StrEnum):
    """How much of a thing is there."""

    OK = "ok"
    LIMITED = "limited"
    """Jobs run, and something is not held or not possible."""
    MISSING = "missing"
    """Jobs cannot run as configured."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a check."""

    level: Level
    name: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.name}: {self.what}" + (f"  — {self.remedy}" if self.remedy else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the configuration asks of the host."""

    state_dir: Path
    shim: Path
    cgroup_parent: str = ""
    defaults: Limits
    allow_missing: tuple[str, ...] = ()
    max_running: int = 1000
    job_uids: tuple[int, int] = (0x70000000, 65536)
    project_ids: tuple[int, int] = PROJECT_IDS
    work_quota: int | None = None
    workspaces: bool = False
    workspace_size: int | None = None


def from_error(name: str, exc: HostError, level: Level = Level.MISSING) -> Finding:
    """The finding that an error is, whose message ends with the remedy."""
    what, _, remedy = exc.message.partition("; ")
    return Finding(level, name, what, remedy)


def existing(path: Path) -> Path:
    """The path, or of the directories above it the first that is there: what will be made is made on its file system."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if is_there(candidate))


def is_there(path: Path) -> bool:
    """As `Path.exists`, which raises PermissionError where one may not look: False there."""
    try:
        return path.exists()
    except OSError:
        return False


def number(path: Path) -> int | None:
    """The number in a file; None if there is none, or the word `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def looked(name: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What is found by looking; where the host does not even let us look, that is the finding."""
    try:
        yield from look()
    except OSError as exc:
        where = f"{exc.filename}: " if exc.filename else ""
        remedy = "/proc and /sys must be there whole: no InaccessiblePaths=, no volume or tmpfs over them"
        yield Finding(Level.MISSING, name, f"cannot be told: {where}{exc.strerror or exc}", remedy)
    except HostError as exc:
        yield from_error(name, exc)


def refuse(findings: Iterable[Finding]) -> None:
    """Raise HostError, in the words of the check, if anything is missing."""
    missing = [finding for finding in findings if finding.level is Level.MISSING]
    if missing:
        first = missing[0]
        more = f" (and {len(missing) - 1} more: run `jobrunnerd check`)" if len(missing) > 1 else ""
        raise HostError(f"cannot run jobs: {first.name}: {first.what}; {first.remedy}{more}")
