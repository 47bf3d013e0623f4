"""The options of `start` and `run` and the request that they make; values of other commands' options."""

from __future__ import annotations

import contextlib
import re
import time
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from jobrunner.errors import ConfigError, InvalidRequest
from jobrunner.job import JobSpec, Limits
from jobrunner.job import OutputPolicy as Policy
from jobrunner.units import parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "Command",
    "Cpus",
    "Cwd",
    "Env",
    "EnvFile",
    "Grace",
    "IdleTimeout",
    "Label",
    "Memory",
    "Merge",
    "Name",
    "Network",
    "OpenFiles",
    "OutputLimit",
    "OutputPolicy",
    "Pids",
    "ReadBps",
    "ReadIops",
    "RequestId",
    "Root",
    "StopSignal",
    "Timeout",
    "TmpSize",
    "User",
    "Volume",
    "WorkSize",
    "Workspace",
    "Writable",
    "WriteBps",
    "WriteIops",
    "count",
    "duration",
    "limits",
    "moment",
    "offset",
    "pairs",
    "spec",
    "words",
]

MAX_ENV_FILE = 4 << 20
T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
Text = str | None

Command = Annotated[list[str], typer.Argument(metavar="COMMAND [ARG]...", help="The command and its arguments.")]
Name = Annotated[str, typer.Option("-n", "--name", metavar="NAME", help="A name for people; also the job's host name.")]
Env = Annotated[list[str], typer.Option("--env", "-e", metavar="NAME=VALUE", help="A variable of the job; repeatable.")]
EnvFile = Annotated[list[str], typer.Option("--env-file", metavar="FILE", help="Variables, NAME=VALUE in each line; repeatable.")]
Cwd = Annotated[str, typer.Option(metavar="DIRECTORY", help="Working directory, absolute.")]
Network = Annotated[str, typer.Option(metavar="none|host", help="The host's network, if the server allows it.")]
Root = Annotated[str, typer.Option(metavar="NAME", help="A root file system that the server names.")]
Writable = Annotated[bool, typer.Option("--writable", help="Let the job write to its root; what it writes vanishes with it.")]
User = Annotated[str, typer.Option(metavar="NAME", help="A user that the server names.")]
Volume = Annotated[list[str], typer.Option(metavar="NAME[:ro]", help="A directory that the server names; repeatable.")]
TmpSize = Annotated[Text, typer.Option(metavar="SIZE", help="Size of /tmp, and of /dev/shm.")]
WorkSize = Annotated[Text, typer.Option(metavar="SIZE", help="Size of /work, which is memory then.")]
Workspace = Annotated[str, typer.Option(metavar="NAME", help="A directory kept for your next job, at /workspace.")]
Cpus = Annotated[Text, typer.Option(metavar="NUMBER", help="CPU time per wall time; 1.5 is one and a half processors.")]
Memory = Annotated[Text, typer.Option(metavar="SIZE", help="Memory, such as 64MiB or 1G.")]
Pids = Annotated[Text, typer.Option(metavar="NUMBER", help="Processes and threads at once.")]
ReadBps = Annotated[Text, typer.Option(metavar="SIZE", help="Bytes read per second from each disk.")]
WriteBps = Annotated[Text, typer.Option(metavar="SIZE", help="Bytes written per second to each disk.")]
ReadIops = Annotated[Text, typer.Option(metavar="NUMBER", help="Reads per second from each disk.")]
WriteIops = Annotated[Text, typer.Option(metavar="NUMBER", help="Writes per second to each disk.")]
OpenFiles = Annotated[Text, typer.Option(metavar="NUMBER", help="Open file descriptors of one process.")]
Timeout = Annotated[Text, typer.Option(metavar="DURATION", help="Ends the job after this time, such as 90s or 1h30m.")]
IdleTimeout = Annotated[Text, typer.Option(metavar="DURATION", help="Ends the job after this time without output.")]
OutputLimit = Annotated[Text, typer.Option(metavar="SIZE", help="Output kept on the server's disk.")]
OutputPolicy = Annotated[Text, typer.Option(metavar="drop-oldest|stop", help="What happens past the output limit.")]
StopSignal = Annotated[str, typer.Option(metavar="SIGNAL", help="The signal that asks the job to end.")]
Grace = Annotated[Text, typer.Option(metavar="DURATION", help="Time between the stop signal and the kill.")]
Merge = Annotated[bool, typer.Option("--merge", help="Both streams as one, in exact order.")]
Label = Annotated[list[str], typer.Option("--label", metavar="KEY=VALUE", help="A label to find jobs by; repeatable.")]
RequestId = Annotated[str, typer.Option(metavar="ID", help="Starting again with the same id gives the same job.")]


def spec(
    command: list[str],
    env: Iterable[str],
    env_file: Iterable[str],
    label: Iterable[str],
    grace: Text,
    limits: Limits,
    name: str,
    **fields: Any,
) -> JobSpec:
    """The request; InvalidRequest names the field whose value no job can have."""
    return JobSpec(
        command[0],
        tuple(command[1:]),
        name=name,
        env=file_pairs(env_file) | pairs("env", env),
        labels=pairs("labels", label),
        grace=duration("grace", grace),
        limits=limits,
        **fields,
    )


def limits(**texts: Text) -> Limits:
    """Limits from the texts of their options, by the fields' names."""
    return Limits(**{name: _parsed(f"limits.{name}", _PARSERS[name], text) for name, text in texts.items()})


def duration(field: str, text: Text, verb: str = "start job") -> float | None:
    """Seconds; InvalidRequest names the field."""
    return _parsed(field, parse_duration, text, verb)


def pairs(field: str, texts: Iterable[str], verb: str = "start job") -> dict[str, str]:
    """NAME=VALUE each; of a name that comes twice the last counts."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidRequest(field, f"{text!r} is not NAME=VALUE", verb)
        values[name] = value
    return values


def file_pairs(files: Iterable[str]) -> dict[str, str]:
    """The variables of files that are read here: what is in no command line is seen by nobody else on this host.

    NAME=VALUE, the value as it stands to the end of the line; empty lines and those that begin with # are left out.
    """
    lines: list[str] = []
    for file in files:
        try:
            with Path(file).open("rb") as opened:
                text = opened.read(MAX_ENV_FILE + 1).decode()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"environment file {file}", getattr(exc, "strerror", None) or "it is not UTF-8") from exc
        if len(text) > MAX_ENV_FILE:
            raise ConfigError(f"environment file {file}", f"it is longer than {MAX_ENV_FILE} bytes, more than any job can be given")
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                if not line.partition("=")[0].strip() or "=" not in line:
                    # Not the line itself: it may be a secret that was written in the wrong way.
                    raise ConfigError(f"environment file {file}", f"line {number} is not NAME=VALUE")
                lines.append(line)
    return pairs("env", lines)


def words(field: str, kind: type[E], texts: Iterable[str], verb: str) -> list[E]:
    """Words of an enumeration; InvalidRequest names the field and the words that there are."""
    known = [str(word) for word in kind]
    for text in texts:
        if text not in known:
            raise InvalidRequest(field, f"{text!r} is not one of {', '.join(known)}", verb)
    return [kind(text) for text in texts]


def count(field: str, text: Text, verb: str) -> int | None:
    """A whole number."""
    return _parsed(field, _integer, text, verb)


def moment(field: str, text: Text, verb: str) -> float | None:
    """Seconds since the epoch: a duration before now, or a time as of ISO 8601, local if it names no offset."""
    return _parsed(field, _moment, text, verb)


def offset(text: str) -> int:
    """A byte of a log."""
    value = _parsed("offset", _integer, text, "read log")
    if value is None or not 0 <= value < 1 << 63:
        raise InvalidRequest("offset", f"{text[:64]!r} is no offset", "read log")
    return value


def _parsed(field: str, parse: Callable[[str], T], text: Text, verb: str = "start job") -> T | None:
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as exc:
        raise InvalidRequest(field, str(exc), verb) from exc


def _integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text):
        raise ValueError(f"{text[:64]!r} is no whole number")
    return int(text)


def _moment(text: str) -> float:
    with contextlib.suppress(ValueError):
        return max(0.0, time.time() - parse_duration(text))  # before 1970 there is no output
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{text[:64]!r} is neither a duration such as 10m nor a time such as 2026-01-31T12:00:00Z") from None


def _decimal(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text[:64]!r} is no number") from None


def _policy(text: str) -> Policy:
    if text not in list(Policy):
        raise ValueError(f"{text[:64]!r} is not one of {', '.join(Policy)}")
    return Policy(text)


_PARSERS: dict[str, Callable[[str], Any]] = {
    "cpus": _decimal,
    "memory": parse_size,
    "pids": _integer,
    "read_bps": parse_size,
    "write_bps": parse_size,
    "read_iops": _integer,
    "write_iops": _integer,
    "open_files": _integer,
    "tmp_size": parse_size,
    "work_size": parse_size,
    "timeout": parse_duration,
    "idle_timeout": parse_duration,
    "output_limit": parse_size,
    "output_policy": _policy,
}
