"""Where hostile jobs run: a real JobRunner, another user's job beside them, and the launch of every job in the test's hands.

`Arena.attack` starts one attack as a job with everything on. `without` names protections that are left out of the launch list of
this job; all else is the same launch. `outside` runs the same program as a process of the host, in no namespace.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from jobrunner import JobInfo, JobSpec, Limits, sandbox
from jobrunner.runner import JobRunner, RunnerJob
from jobrunner.shim.launch import PROTECTIONS as PROTECT
from jobrunner.shim.launch import LaunchPlan, pack_plan
from tests.hostile.inside import base
from tests.support.runner import open_runner, output
from tests.support.shim import all_pids, read_proc, status_field
from tests.support.timing import at_most, fail_after

PYTHON = "/usr/bin/python3"
INSIDE = Path(base.__file__).parent
LOADER = """
import sys, types
sys.dont_write_bytecode = True
for name, text in {sources!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
sys.modules["tests.hostile.inside.base"].main(*sys.argv[1:])
"""
SMALL = Limits(memory=192 << 20, pids=64, timeout=at_most(30), output_limit=4 << 20)
"""What a hostile job may use: the host survives it even where a protection is left out."""
HEART = "import time\nwhile True: print('beat', flush=True); time.sleep(0.05)"
"""Beats on where no process can be made any more."""


def _unprotected(name: str) -> Callable[[LaunchPlan], dict[str, Any]]:
    return lambda plan: {"protect": [one for one in plan.protect if one != name]}


def _no_new_privs(plan: LaunchPlan) -> dict[str, Any]:
    """The filter goes with it: without no_new_privs only root may have one (seccomp(2))."""
    return _unprotected("no-new-privs")(plan) | {"seccomp": b""}


def _host_root(_: LaunchPlan) -> dict[str, Any]:
    return {"show": (), "root": "", "mask": (), "work": "", "work_size": None, "tmp_size": None, "volumes": (), "cwd": "/"}


PROTECTIONS: Mapping[str, Callable[[LaunchPlan], dict[str, Any]]] = {
    "limits": lambda _: {"cgroup_items": ()},
    "uid": lambda _: {"uid": None, "gid": None, "user_name": "", "cwd": "/"},
    "root": _host_root,
    "mask": lambda _: {"mask": ()},
    "network": lambda _: {"network_host": True},
    "seccomp": lambda _: {"seccomp": b""},
    **{name: _unprotected(name) for name in PROTECT},
    "no-new-privs": _no_new_privs,
}
"""Each is a change of the launch that leaves this protection, and nothing else, out."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`word` is `succeeded`, `refused`, or the end reason of a job that did not live to tell; `why` the errno or what was had."""

    word: str
    why: str
    info: JobInfo
    output: bytes

    @property
    def text(self) -> str:
        return f"{self.word}: {self.why}" if self.why else self.word


def program(module: str, name: str, *args: str) -> list[str]:
    """The command of an attack of tests/hostile/inside."""
    return _command((module,), name, *args)


def series(attacks: Sequence[tuple[str, ...]]) -> list[str]:
    """The command of many, one after the other, each (module, name, argument...)."""
    modules = dict.fromkeys(one[0] for one in attacks)
    return _command(modules, "series", json.dumps([one[1:] for one in attacks]))


def _command(modules: Iterable[str], *args: str) -> list[str]:
    sources = {f"tests.hostile.inside.{one}": (INSIDE / f"{one}.py").read_text() for one in ("base", *modules)}
    return [PYTHON, "-IS", "-c", LOADER.format(sources=sources), *args]


def series_told(text: str) -> list[str]:
    """What each of a series told."""
    parts = text.split("== ")[1:]
    return [": ".join(told(part.partition("\n")[2].encode())) for part in parts]


def told(text: bytes) -> tuple[str, str]:
    """The last line of an attack's output, as its two parts."""
    last = text.decode(errors="replace").rstrip("\n").rpartition("\n")[2]
    word, _, why = last.partition(": ")
    return (word, why) if word in ("succeeded", "refused") else ("", last)


class Arena:
    """Made by `open_arena`. `bystander` is another user's job, that nothing may disturb."""

    def __init__(self, runner: JobRunner) -> None:
        self.runner = runner
        self.secret = secrets.token_hex(16)
        self.changes: Callable[[LaunchPlan], LaunchPlan] = lambda plan: plan
        self.bystander: RunnerJob

    def packing(self, others: Callable[[LaunchPlan], bytes]) -> Callable[[LaunchPlan], bytes]:
        """What `sandbox.launch` packs its plans with: those of this arena are changed."""
        jobs = str(self.runner.state.path)
        return lambda plan: pack_plan(self.changes(plan)) if plan.directory.startswith(jobs) else others(plan)

    async def start(
        self, *command: str, without: Collection[str] = (), change: Mapping[str, Any] | None = None, **spec: Any
    ) -> RunnerJob:
        """Start a job with these protections left out, and with this change of its launch."""

        def changed(plan: LaunchPlan) -> LaunchPlan:
            plan = replace(plan, **(change or {}))
            for name in without:
                plan = replace(plan, **PROTECTIONS[name](plan))
            return plan

        self.changes = changed
        try:
            return await self.runner.start(JobSpec(command[0], command[1:], **{"limits": SMALL, **spec}), user="mallory")
        finally:
            self.changes = lambda plan: plan

    async def attack(self, module: str, name: str, *args: str, **how: Any) -> Outcome:
        """One attack, from start to end; afterwards the bystander lives."""
        with fail_after(40):
            job = await self.start(*program(module, name, *args), **how)
            return await self.outcome(job)

    async def outcome(self, job: RunnerJob) -> Outcome:
        data = await output(job, seconds=at_most(40))
        info = await job.wait()
        word, why = told(data)
        if info.exit_code not in (0, base.REFUSED) or not word:
            word, why = str(info.end_reason), why if info.end_reason == "exited" else ""
        assert self.bystander.status == "running"
        return Outcome(word, why, info, data)

    async def heartbeat(self) -> None:
        """The bystander goes on writing."""
        before = self.bystander.info().log_end
        with fail_after(20):
            async with self.bystander.log(before) as reader:
                await reader.next_line()


def process_of(job: RunnerJob, number: int) -> int:
    """The pid out here of a job's process, by that inside."""
    mine = [pid for pid in all_pids() if job.job_id.encode() in read_proc(pid, "cgroup")]
    (pid,) = [pid for pid in mine if status_field(pid, "NSpid").split()[1:] == [str(number)]]
    return pid


def outside(module: str, name: str, *args: str, cwd: Path | None = None) -> str:
    """The same attack by a process of the host: `succeeded` or `refused`, and why."""
    done = subprocess.run(program(module, name, *args), cwd=cwd, capture_output=True, timeout=at_most(30), check=False)
    return ": ".join(told(done.stdout))


@asynccontextmanager
async def open_arena(path: Path, **config: Any) -> AsyncIterator[Arena]:
    """The bystander's environment has a secret, and its record is beside everyone's."""
    async with open_runner(path, **config) as runner:
        arena = Arena(runner)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sandbox, "pack_plan", arena.packing(vars(sandbox)["pack_plan"]))
            arena.bystander = await runner.start(JobSpec(PYTHON, ("-c", HEART), env={"SECRET": arena.secret}), user="alice")
            yield arena
            await arena.heartbeat()
