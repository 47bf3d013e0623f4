"""What a caller asks for: checked once, when the value is made. No I/O; sizes are bytes, times seconds."""

from __future__ import annotations

import functools
import re
import signal as signals
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from jobrunner.errors import InvalidRequest
from jobrunner.limits import Limits, check_number

__all__ = ["MAX_GRACE", "JobSpec", "is_job_id", "is_name", "os_bytes", "signal_name", "signal_number"]

MAX_ARG = 131071
"""Longest argument or NAME=VALUE, in bytes without its NUL: MAX_ARG_STRLEN - 1, execve(2)."""
MAX_ARGS_TOTAL = 1 << 20
"""Bytes of all arguments and the environment together; half of what the kernel takes with an 8 MiB stack (execve(2))."""
MAX_ARGS = 32_000
"""Arguments, and half as many variables: what can be asked for can also be answered in one message (wire/codec.py)."""
MAX_NAME = 128
MAX_GRACE = 86400
"""Seconds."""
MAX_LABELS = 64
MAX_VOLUMES = 64
NETWORKS = ("none", "host")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ENV_NAME = re.compile(r"[^=\0]+")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a caller asks for. Checked once, here; whoever holds a JobSpec holds a valid one."""

    command: str
    args: tuple[str, ...] = ()
    name: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    limits: Limits = field(default_factory=Limits)
    labels: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""
    merge: bool = False
    stop_signal: str = "TERM"
    grace: float | None = None
    """Seconds between the stop signal and the kill; None means the server's default."""
    root: str = ""
    """A root file system that the server's configuration names, instead of the host's programs."""
    writable: bool = False
    """Whether the root can be written to; what is written vanishes with the job."""
    network: str = ""
    """`none`, which is the default, or `host`."""
    user: str = ""
    """A user that the server's configuration names; empty: a user id that no other job has."""
    volumes: tuple[str, ...] = ()
    """Each `NAME` or `NAME:ro`, of the server's configuration; they are at /volumes/NAME."""
    workspace: str = ""
    """A directory kept for the next job that asks for it, at /workspace; one job has it at a time."""
    stdin: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "volumes", tuple(self.volumes))
        object.__setattr__(self, "env", MappingProxyType(dict(self.env)))
        object.__setattr__(self, "labels", MappingProxyType(dict(self.labels)))
        if not self.command:
            raise InvalidRequest("command", "must not be empty")
        _check_text("command", self.command)
        if len(self.args) > MAX_ARGS:
            raise InvalidRequest("args", f"{len(self.args)} are more than {MAX_ARGS}")
        if len(self.env) > MAX_ARGS // 2:
            raise InvalidRequest("env", f"{len(self.env)} variables are more than {MAX_ARGS // 2}")
        for index, arg in enumerate(self.args):
            _check_text(f"args[{index}]", arg)
        for name, value in self.env.items():
            if not _ENV_NAME.fullmatch(name):
                raise InvalidRequest("env", f"{name!r} is no name of a variable")
            _check_text(f"env[{name}]", f"{name}={value}")
        total = sum(len(os_bytes(text)) + 9 for text in (self.command, *self.args))
        total += sum(len(os_bytes(name)) + len(os_bytes(value)) + 10 for name, value in self.env.items())
        if total > MAX_ARGS_TOTAL:
            raise InvalidRequest("args", f"{total} bytes with env are more than the {MAX_ARGS_TOTAL} that can be passed")
        if self.cwd and not self.cwd.startswith("/"):
            raise InvalidRequest("cwd", f"{self.cwd!r} is not absolute")
        _check_text("cwd", self.cwd)
        _check_name("name", self.name)
        if len(self.labels) > MAX_LABELS:
            raise InvalidRequest("labels", f"{len(self.labels)} are more than {MAX_LABELS}")
        for name, value in self.labels.items():
            if not 0 < len(name) <= MAX_NAME or len(value) > 1024 or "\0" in name + value:
                raise InvalidRequest("labels", f"{name!r} is too long, empty or has a NUL")
        if len(self.request_id) > MAX_NAME or "\0" in self.request_id:
            raise InvalidRequest("request_id", f"is longer than {MAX_NAME} characters or has a NUL")
        signal_number(self.stop_signal)
        check_number("grace", self.grace, 0, MAX_GRACE)
        _check_places(self)


def _check_places(spec: JobSpec) -> None:
    """What the job asks for by a name of the configuration; whether there is such a name, the server says."""
    for field_name in ("root", "user", "workspace"):
        _check_name(field_name, getattr(spec, field_name))
    if spec.network and spec.network not in NETWORKS:
        raise InvalidRequest("network", f"{spec.network!r} is none of {', '.join(NETWORKS)}")
    if len(spec.volumes) > MAX_VOLUMES:
        raise InvalidRequest("volumes", f"{len(spec.volumes)} are more than {MAX_VOLUMES}")
    names = [volume.removesuffix(":ro") for volume in spec.volumes]
    for name in names:
        _check_name("volumes", name or " ")
        if names.count(name) > 1:
            raise InvalidRequest("volumes", f"{name!r} is there twice")


def os_bytes(text: str) -> bytes:
    """The bytes that the kernel is given for a text: UTF-8, undecodable bytes kept (PEP 383)."""
    return text.encode("utf-8", "surrogateescape")


def is_name(text: str) -> bool:
    """Whether this can be the name of a job, or of anything that the configuration names."""
    return len(text) <= MAX_NAME and _NAME.fullmatch(text) is not None


def _check_name(field_name: str, text: str) -> None:
    if text and not is_name(text):
        raise InvalidRequest(field_name, f"{text!r} is not 1 to {MAX_NAME} of A-Z a-z 0-9 _ . - from a letter or digit on")


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise InvalidRequest(name, "must not contain a NUL byte")
    if len(os_bytes(text)) > MAX_ARG:
        raise InvalidRequest(name, f"{len(os_bytes(text))} bytes are more than the {MAX_ARG} that the kernel takes")


def signal_number(name: str) -> int:
    """The number of a signal given as `TERM`, `SIGTERM` or `15`; InvalidRequest if it is none or cannot stop a job."""
    text = name.upper().removeprefix("SIG")
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else signals.Signals.__members__.get(f"SIG{text}", 0)
    if number not in _stopping_signals():
        raise InvalidRequest("stop_signal", f"{name!r} is no signal that a job can be stopped with")
    return int(number)


@functools.cache
def _stopping_signals() -> frozenset[int]:
    """Numbers; kept, because `valid_signals` makes 64 enum members each time it is asked."""
    return frozenset(map(int, signals.valid_signals())) - {signals.SIGSTOP, signals.SIGCHLD}


def signal_name(number: int) -> str:
    """`SIGTERM` for 15; `signal 64` where it has no name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def is_job_id(text: str) -> bool:
    """Whether this text has the form of a job id: 12 lower-case hexadecimal characters."""
    return re.fullmatch(r"[0-9a-f]{12}", text) is not None
