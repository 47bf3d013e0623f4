"""What a running job costs in memory besides itself."""

from __future__ import annotations

from jobrunner.client import JobClient
from tests.bench.limit import at_once
from tests.bench.report import Cell, Part, Sizes
from tests.bench.server import Server, helpers_pss

__all__ = ["memory"]

KIB = 1024


async def memory(server: Server, client: JobClient, sizes: Sizes) -> Part:
    """PSS of shim and init of one job and of many, and the growth of the server."""
    first = await client.start("sleep", "1000")
    one = helpers_pss({first.job_id})
    before = server.rss
    jobs = [first.job_id]

    async def start(_: int) -> None:
        jobs.append((await client.start("sleep", "1000")).job_id)

    await at_once(8, sizes.sleepers - 1, start)
    many = helpers_pss(set(jobs))
    grown = server.rss - before
    await at_once(8, len(jobs), lambda number: client.get(jobs[number]).stop(grace=0))
    figures = {
        "jobs": sizes.sleepers,
        "helpers_pss_of_one": sum(one),
        "helpers_pss_of_each": sum(many) / sizes.sleepers,
        "helpers": len(many),
        "server_rss": before,
        "server_rss_per_job": grown / (sizes.sleepers - 1),
    }
    rows: list[list[Cell]] = [
        ["shim and init, 1 job running: PSS", sum(one) / KIB],
        [f"shim and init, {sizes.sleepers} jobs running: PSS of each job", sum(many) / KIB / sizes.sleepers],
        ["server: RSS with 1 job", before / KIB],
        ["server: RSS for each further job", grown / KIB / (sizes.sleepers - 1)],
    ]
    return Part("memory", "Memory of a running job, KiB", ["", "KiB"], rows, figures)
