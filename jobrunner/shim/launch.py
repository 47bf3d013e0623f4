"""What the launcher is given and what it answers (docs/formats.md, Launch)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobrunner.job import OutputPolicy
from jobrunner.shim.items import pack_items

__all__ = ["PROTECTIONS", "LaunchPlan", "Report", "VolumeMount", "pack_plan", "parse_report"]

PROTECTIONS = ("capabilities", "no-new-privs", "keyring", "proc")
"""All that `protect` can name: no capability in any set, no_new_privs, a session keyring of its own, masks of /proc and /sys."""


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """A directory of the host at a path of the job's."""

    source: str
    target: str
    read_only: bool = False
    owner: tuple[int, int] | None = None
    """(uid, gid) that its files have on disk and that are the job's own inside; None leaves them as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """Everything the shim needs to know of a job; times in seconds, sizes in bytes."""

    directory: str
    """The job's, absolute; it and `log/` in it exist."""
    command: Sequence[str]
    env: Mapping[str, str]
    cwd: str = "/"
    hostname: str
    cgroup_items: Sequence[tuple[str, str]] = ()
    """The items that the job's cgroup gives: where to enter, OOM notice, counters."""
    network_host: bool = False
    """The host's network instead of a namespace with nothing but loopback."""
    merge: bool = False
    stop_signal: int = 15
    grace: float = 10.0
    birth: float | None = None
    """How long it may take until the command is executed; a birth that hangs is a start that failed."""
    timeout: float | None = None
    idle_timeout: float | None = None
    open_files: int | None = None
    segment_bytes: int = 16 << 20
    """The shim makes segments no larger than an eighth of `output_limit`."""
    output_limit: int | None = None
    """Bytes of the log on disk, data and index together; None keeps everything."""
    output_policy: OutputPolicy = OutputPolicy.DROP_OLDEST
    on_write_error: str = "continue"
    """`continue`, or `stop`: the first byte that cannot be written ends the job."""

    # Each protection is a field of its own; one that is left as it is here is off.
    uid: int | None = None
    gid: int | None = None
    user_namespace: bool = False
    """For a launcher that is not root: a user namespace in which `uid` and `gid` are its own."""
    id_helpers: tuple[str, str] | None = None
    """newuidmap and newgidmap: with them `uid` and `gid` are themselves on the host too, ids of the launcher's user's."""
    user_name: str = ""
    """In a line of the job's own /etc/passwd and /etc/group."""
    show: Sequence[str] = ()
    """What the job sees of the host, read-only, in a root of its own; what the host lacks is skipped."""
    root: str = ""
    """A directory of the host that is the job's root instead."""
    writable: bool = False
    """Writes to the root work, and vanish with the job."""
    mask: Sequence[str] = ()
    """What is hidden of it."""
    volumes: Sequence[VolumeMount] = ()
    work: str = ""
    """The directory of the host on /work."""
    work_size: int | None = None
    """Instead of it, a tmpfs of this size."""
    tmp_size: int | None = None
    """Of /tmp and of /dev/shm, each."""
    seccomp: bytes = b""
    """A filter as seccomp(2) takes it."""
    protect: Sequence[str] = ()
    """Of PROTECTIONS."""


@dataclass(frozen=True, slots=True)
class Report:
    """The launcher's answer: started, or the step that failed, its errno (0 if no system call failed) and what it was at."""

    started: bool
    step: str = ""
    errno: int = 0
    detail: str = ""


def pack_plan(plan: LaunchPlan) -> bytes:
    """The item list for the launcher's standard input."""
    items = [("dir", plan.directory), ("hostname", plan.hostname), ("cwd", plan.cwd), *plan.cgroup_items]
    items += [("merge", str(int(plan.merge))), ("stop-signal", str(plan.stop_signal)), ("segment-bytes", str(plan.segment_bytes))]
    items += [("grace-ms", _milliseconds(plan.grace)), ("network", "host" if plan.network_host else "none")]
    for key, seconds in (("birth-ms", plan.birth), ("timeout-ms", plan.timeout), ("idle-timeout-ms", plan.idle_timeout)):
        if seconds is not None:
            items.append((key, _milliseconds(seconds)))
    for key, number in (("open-files", plan.open_files), ("output-limit", plan.output_limit)):
        if number is not None:
            items.append((key, str(number)))
    items += [("output-policy", plan.output_policy), ("on-write-error", plan.on_write_error)]
    items += _isolation(plan)
    items += [("env", f"{name}={value}") for name, value in plan.env.items()]
    items += [("arg", arg) for arg in plan.command]
    return pack_items("jobrunner-launch", items)


def _isolation(plan: LaunchPlan) -> list[tuple[str, str]]:
    texts = (("user-name", plan.user_name), ("root", plan.root), ("work", plan.work), ("seccomp", plan.seccomp.hex()))
    numbers = (("uid", plan.uid), ("gid", plan.gid), ("work-size", plan.work_size), ("tmp-size", plan.tmp_size))
    items = [(key, text) for key, text in texts if text]
    items += [(key, str(number)) for key, number in numbers if number is not None]
    for key, values in (("show", plan.show), ("mask", plan.mask), ("protect", plan.protect)):
        items += [(key, value) for value in values]
    for volume in plan.volumes:
        mode, owner = "ro" if volume.read_only else "rw", "{}:{}".format(*volume.owner) if volume.owner else "-"
        items.append(("volume", f"{mode} {owner} {volume.target} {volume.source}"))
    if plan.user_namespace:
        items.append(("user-namespace", "1"))
    if plan.id_helpers:
        items += zip(("uid-helper", "gid-helper"), plan.id_helpers, strict=True)
    if plan.writable:
        items.append(("writable", "1"))
    return items


def parse_report(line: bytes) -> Report | None:
    """The launcher's line; None if it is none: then the helper was killed before it could tell."""
    text = line.decode("utf-8", "replace")
    if text == "started\n":
        return Report(True)
    match = re.fullmatch(r"failed (\S+) (\d+) (.*)\n", text, re.DOTALL)
    return Report(False, match[1], int(match[2]), match[3]) if match else None


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))
