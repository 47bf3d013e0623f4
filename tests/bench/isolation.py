"""What isolation costs at a start: the launch that a job really has against the same with namespaces and cgroup alone, in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobrunner import JobSpec
from jobrunner.runner import JobRunner
from jobrunner.shim.launch import LaunchPlan, pack_plan
from tests.bench.report import Cell, Part, Sizes, quantiles
from tests.bench.starts import launched
from tests.hostile.arena import PROTECTIONS

__all__ = ["isolation"]

KEPT = ("limits", "network")


def bare(plan: LaunchPlan) -> LaunchPlan:
    """Without each protection but its cgroup and its namespaces."""
    for name, left_out in PROTECTIONS.items():
        plan = plan if name in KEPT else replace(plan, **left_out(plan))
    return plan


async def real_plan(runner: JobRunner) -> LaunchPlan:
    """The launch of a job of this runner."""
    plans: list[LaunchPlan] = []

    def keep(plan: LaunchPlan) -> bytes:
        plans.append(plan)
        return pack_plan(plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobrunner.sandbox.pack_plan", keep)
        await (await runner.start(JobSpec("/bin/true"))).wait()
    return plans[0]


async def isolation(runner: JobRunner, scratch: Path, sizes: Sizes) -> Part:
    """From the item list to the report that the command was executed, in a cgroup that stays."""
    plan = await real_plan(runner)
    kinds: dict[str, Callable[[LaunchPlan], LaunchPlan]] = {"namespaces and cgroup only": bare, "with everything": lambda one: one}
    host = runner.cgroups
    cgroup = host.create("0" * 12, runner.config.defaults, (), runner.config.allow_missing)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    try:
        for number in range(-5, sizes.rounds):
            for kind, change in kinds.items():
                directory = scratch / f"isolation-{number}-{kind.partition(' ')[0]}"
                work = directory / "work"
                (directory / "log").mkdir(parents=True)
                work.mkdir()
                own = replace(plan, directory=str(directory), work=str(work), cgroup_items=cgroup.launch_items())
                started, _ = launched(change(own))
                if number >= 0:
                    times[kind].append(started)
    finally:
        await cgroup.removed()
    found = {kind: quantiles(one) for kind, one in times.items()}
    added = found["with everything"]["p50"] - found["namespaces and cgroup only"]["p50"]
    rows: list[list[Cell]] = [[kind, *one.values()] for kind, one in found.items()]
    rows.append(["difference of p50", added, "-", "-"])
    return Part("isolation", "What isolation adds to a start, ms", ["", "p50", "p90", "p99"], rows, {**found, "added_p50": added})
