"""The last word of `jobrunnerd check`: jobs that are really run, with all of their protections, and what they say of themselves.

A runner of its own, in a directory of its own beside where jobs will be kept, does what a server would do: nothing is imitated, so
whatever would fail the first real start fails here. Nothing is left of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import anyio

from jobrunner import leavings, places
from jobrunner.config import RunnerConfig
from jobrunner.errors import HostError, JobRunnerError, StartFailed
from jobrunner.handle import RunnerJob
from jobrunner.job import JobSpec, Limits
from jobrunner.linux.check_cgroup import put_back
from jobrunner.linux.finding import Finding, Level, existing, from_error
from jobrunner.linux.remedies import of_step
from jobrunner.linux.user import is_root
from jobrunner.output import Chunk
from jobrunner.runner import JobRunner
from jobrunner.sandbox import own_ids
from jobrunner.shim.launch import Report

__all__ = ["run"]

TIMEOUT = 60.0
"""Seconds for all of them: a volume on a file system that does not answer must not hold the check up for ever."""
UIDS = 8
"""So few of the uids that jobs can have, the last ones: hardly those of a server beside this one."""
BUG = "do not run jobs here, and report it: what was set up does not hold"
NONE = "0000000000000000"
CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def run(config: RunnerConfig) -> list[Finding]:
    """One finding for a job as any other, one for each root and volume that is offered, and for what else jobs may ask for."""
    return anyio.run(_run, config)


async def _run(config: RunnerConfig) -> list[Finding]:
    found: list[Finding] = []
    left: list[Finding] = []
    try:
        with anyio.fail_after(TIMEOUT), _place(config) as own:
            left = await leavings.clear(replace(own, state_dir=config.state_dir))
            async with _opened(own) as runner:
                await _jobs(runner, found)
    except HostError as exc:
        found.append(from_error("job", exc))
    except JobRunnerError as exc:
        found.append(_failed("job", Level.MISSING, exc))
    except TimeoutError:
        name, level = ("offers", Level.LIMITED) if found else ("job", Level.MISSING)
        what = f"not done after {TIMEOUT:.0f} s; the last to be done was {found[-1].name if found else 'none'}"
        found.append(Finding(level, name, what, "see which file system does not answer: an NFS server that is away?"))
    except OSError as exc:
        found.append(Finding(Level.LIMITED, "offers", f"{exc.filename or 'run'}: {exc.strerror}", "make that possible"))
    return left + found


@contextlib.contextmanager
def _place(config: RunnerConfig) -> Iterator[RunnerConfig]:
    """The settings, for a runner that leaves those of a server alone: state directory, cgroup and uids are its own."""
    ids = own_ids(config)
    first, count = (ids.first, ids.count) if ids else config.job_uids
    few = min(UIDS, count)
    there = existing(config.state_dir)
    with put_back() as parent, tempfile.TemporaryDirectory(prefix=leavings.PREFIX, dir=there) as directory:
        yield replace(
            config,
            state_dir=Path(directory),
            ceilings=Limits(),
            cgroup_parent=config.cgroup_parent or parent,
            job_uids=(first + count - few, few),
            hide=(*config.hide, os.path.realpath(config.state_dir)),
        )


@contextlib.asynccontextmanager
async def _opened(config: RunnerConfig) -> AsyncIterator[JobRunner]:
    """A runner whose jobs end with it: one that hangs is killed."""
    async with JobRunner.open(config) as runner:
        try:
            yield runner
        finally:
            with anyio.CancelScope(shield=True):
                await runner.stop_all(grace=0)


async def _jobs(runner: JobRunner, found: list[Finding]) -> None:
    """Adds to `found` as they end, so that what takes too long loses none."""
    found.append(await _plain(runner))
    if found[-1].level is Level.MISSING:
        return
    for name, right, spec, caller in _offered(runner.config):
        found += [await _special(runner, name, right, spec, caller)]


def _offered(config: RunnerConfig) -> Iterator[tuple[str, str, JobSpec, str]]:
    """What jobs may ask for: its finding's name, what is said when it works, a job that asks for it, and who may."""
    given = "can be given to jobs"
    yield "writable root", given, JobSpec("true", writable=True), ""
    for name in config.offers.roots:
        yield f"root {name}", "can be entered", JobSpec("true", root=name), ""
    for name, volume in config.offers.volumes.items():
        yield f"volume {name}", given, JobSpec("true", volumes=(f"{name}:ro" if volume.read_only else name,)), ""
    for name, user in config.offers.users.items() if is_root() else ():
        yield f"user {name}", "jobs can be it", JobSpec("true", user=name), (user.callers or ("",))[0]
    if config.workspaces:
        yield "workspace", given, JobSpec("true", workspace="check"), ""
    if config.network_host:
        yield "network host", given, JobSpec("true", network="host"), ""


async def _plain(runner: JobRunner) -> Finding:
    """A job as any other, which tells what the kernel says of it."""
    begun = time.monotonic()
    try:
        job = await runner.start(JobSpec("cat", ("/proc/self/status", "/proc/self/mounts")))
        info = await job.wait()
    except JobRunnerError as exc:
        return _failed("job", Level.MISSING, exc)
    took = time.monotonic() - begun
    if info.exit_code != 0:
        return Finding(Level.MISSING, "job", f"one that was run: {info.message}", "see `jobrunnerd check` in a shell, and dmesg")
    wrong = _untrue(await _output(job), job.record.uid, is_root() or runner.ids is not None)
    if wrong:
        return Finding(Level.MISSING, "job", f"one that was run says of itself: {'; '.join(wrong)}", BUG)
    what = f"one was run in {took * 1000:.0f} ms: uid {job.record.uid}, no capability, filter set, a read-only root"
    return Finding(Level.OK, "job", what)


async def _special(runner: JobRunner, name: str, right: str, spec: JobSpec, caller: str) -> Finding:
    """A job that asks for one thing more; that it cannot have it leaves other jobs possible."""
    try:
        await (await runner.start(spec, user=caller)).wait()
    except StartFailed as exc:
        if exc.step != "exec":  # the last step, so what was asked for was there; a root need not have a `true`
            return _failed(name, Level.LIMITED, exc)
    except JobRunnerError as exc:
        return _failed(name, Level.LIMITED, exc)
    return Finding(Level.OK, name, right)


def _failed(name: str, level: Level, exc: JobRunnerError) -> Finding:
    if not isinstance(exc, StartFailed):
        return Finding(level, name, exc.message, "see the message")
    reason = os.strerror(exc.errno) if exc.errno else ""
    known = places.remedy(Report(False, exc.step, exc.errno))
    detail = exc.detail.removesuffix(known).rstrip(": ") if known else exc.detail
    what = ": ".join(part for part in (exc.step, detail, reason) if part)
    if name == "workspace" and (exc.step, exc.errno) == ("idmap", errno.EINVAL):
        known = "a --state-dir on a file system that can map ids: ext4, xfs or btrfs, Linux 5.12; not overlay, not NFS"
    return Finding(level, name, what, known or of_step(exc.step, exc.errno, exc.detail))


async def _output(job: RunnerJob) -> str:
    async with job.log(follow=False) as reader:
        return b"".join([part.data async for part in reader if isinstance(part, Chunk)]).decode("utf-8", "replace")


def _untrue(text: str, uid: int, own: bool) -> list[str]:
    """What /proc/self/status and /proc/self/mounts of the job do not say as they should (proc(5))."""
    status = dict(line.split(":", 1) for line in text.splitlines() if line.split(":", 1)[0].isalpha() and ":" in line)
    mounts = [line.split(" ") for line in text.splitlines() if line.startswith("/") or line.count(" ") == 5]
    ids = " ".join([str(uid)] * 4)
    expected = {"Uid": ids, "Gid": ids, "Groups": "", "NoNewPrivs": "1", "Seccomp": "2", **dict.fromkeys(CAPABILITY_SETS, NONE)}
    if not own:
        del expected["Groups"]  # the server's user's stay: user_namespaces(7)
    wrong = [
        f"{name} is {' '.join(status.get(name, 'not there').split()) or 'empty'}"
        for name, value in expected.items()
        if " ".join(status.get(name, "not there").split()) != value
    ]
    root = [mount[3].split(",") for mount in mounts if len(mount) == 6 and mount[1] == "/"]
    return wrong if root and "ro" in root[-1] else [*wrong, "its root is not read-only"]
