"""What this host offers jobs, and the exact remedy for what it lacks. What can be tried is tried; settings are read only elsewhere.

Two depths, of the same findings: `quick` and `limits_apply` are what a server asks itself before it starts, a few milliseconds;
`everything` is `jobrunnerd check`.
"""

from __future__ import annotations

from jobrunner.linux.check_birth import quick
from jobrunner.linux.check_bounds import bounds
from jobrunner.linux.check_cgroup import cgroups, limits_apply
from jobrunner.linux.check_work import work, workspaces
from jobrunner.linux.finding import Finding, Level, Needs, looked, refuse

__all__ = ["Finding", "Level", "Needs", "everything", "limits_apply", "quick", "refuse", "workspaces"]


def everything(needs: Needs) -> list[Finding]:
    """All findings, in the order in which they are worth mending. Leaves nothing behind."""
    birth = list(looked("birth", lambda: quick(needs)))
    if birth[-1].name in ("system", "/proc"):
        return birth  # nothing can be looked at there
    return [
        *birth,
        *looked("cgroup", lambda: cgroups(needs)),
        *looked("bounds", lambda: bounds(needs)),
        *looked("work directories", lambda: [work(needs)]),
        *looked("workspaces", lambda: [workspaces(needs)]),
    ]
