"""What it costs a job that its output is kept: into the log, next to into `cat > file`, both as jobs with the same limits."""

from __future__ import annotations

import statistics

from jobrunner import JobSpec, Limits
from jobrunner.runner import JobRunner
from tests.bench.report import Cell, Part, Sizes

__all__ = ["log_writing"]

FILE = "flood"
"""In the job's own directory."""
LIMITS = Limits(cpus=2, read_bps=10**11, write_bps=10**11)


async def log_writing(runner: JobRunner, sizes: Sizes) -> Part:
    """A flood in large writes, and one in writes of a byte."""
    kinds = {
        f"head -c {sizes.flood_bytes >> 20}MiB": (f"head -c {sizes.flood_bytes} /dev/zero", sizes.flood_bytes),
        f"{sizes.single_bytes} writes of 1 byte": (
            f"dd if=/dev/zero bs=1 count={sizes.single_bytes} status=none",
            sizes.single_bytes,
        ),
    }
    rows: list[list[Cell]] = []
    figures = {}
    for name, (command, size) in kinds.items():
        log, cat, index = [], [], 0
        for _ in range(sizes.floods):
            wall, index, _ = await _run(runner, command, size)
            log.append(wall)
            wall, _, written = await _run(runner, f"{command} | cat > {FILE}", 0)
            cat.append(wall)
            if written != size:
                raise RuntimeError(f"{FILE} has {written} bytes")
        taken = {"into_log_s": statistics.median(log), "into_cat_s": statistics.median(cat)}
        figures[name] = taken | {"speed_of_cat": taken["into_cat_s"] / taken["into_log_s"], "index_bytes": index}
        rows.append([name, taken["into_cat_s"] / taken["into_log_s"], *taken.values(), index / size])
    header = ["", "speed / into cat", "into the log, s", "into cat, s", "index / output"]
    return Part("log_writing", "Writing output", header, rows, figures)


async def _run(runner: JobRunner, command: str, size: int) -> tuple[float, int, int]:
    """Seconds of the job's life by its shim, the size of its log's index, and that of its file."""
    job = await runner.start(JobSpec("sh", ("-c", command), limits=LIMITS))
    info = await job.wait()
    if info.exit_code != 0 or info.log_end != size or info.usage.wall is None:
        raise RuntimeError(f"{command}: {info}")
    directory = runner.state.directory(job.job_id)
    index = sum(file.stat().st_size for file in (directory / "log").glob("*.idx"))
    written = sum(file.stat().st_size for file in (directory / "work").glob(FILE))
    await runner.remove(job.job_id)
    return info.usage.wall, index, written
