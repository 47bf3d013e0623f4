"""What bounds the directories on disk that jobs write to: their own, and workspaces."""

from __future__ import annotations

from jobrunner.linux.finding import Finding, Level, Needs
from jobrunner.linux.quota import Projects
from jobrunner.units import format_size

__all__ = ["work", "workspaces"]

REMEDY = (
    "project quotas: ext4: tune2fs -O quota,project -Q prjquota DEVICE while it is not mounted, then mount it with prjquota; "
    "xfs: mount it with prjquota; or another --state-dir"
)


def work(needs: Needs) -> Finding:
    """Where /work of a job is, and what bounds it."""
    name, size = "work directories", needs.defaults.work_size
    lack = Projects(needs.state_dir, *needs.project_ids).lack
    if not lack:
        size = size or needs.work_quota
        bound = f"{format_size(size)} for a job that does not say" if size else "no bound for a job that does not say"
        return Finding(Level.OK, name, f"on disk, bounded by project quotas: {bound}")
    if size:
        return Finding(Level.OK, name, f"in memory, {format_size(size)} for a job that does not say: {lack}")
    what = f"on disk without a bound, in memory for a job that says a size: {lack}"
    return Finding(Level.LIMITED, name, what, f"{REMEDY}; or work_size in [defaults], which is memory")


def workspaces(needs: Needs) -> Finding:
    """Whether each can be as large as is configured, and no larger."""
    size, lack = needs.workspace_size, Projects(needs.state_dir, *needs.project_ids).lack
    if not needs.workspaces:
        return Finding(Level.OK, "workspaces", "none")
    if size is None:
        remedy = "workspace_size in the configuration, with project quotas"
        return Finding(Level.LIMITED, "workspaces", "each as large as jobs make it, without a bound", remedy)
    if lack:
        return Finding(Level.MISSING, "workspaces", f"workspace_size = {format_size(size)} cannot be kept: {lack}", REMEDY)
    return Finding(Level.OK, "workspaces", f"{format_size(size)} each, bounded by project quotas")
