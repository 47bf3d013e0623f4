"""Many ended jobs, without running them: copies of one that did run, each with an id, a name and a request id of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

__all__ = ["multiply"]


def multiply(state: Path, job_id: str, count: int) -> list[str]:
    """Make `count` copies of this job, as if each had been started a second after the one before. The ids."""
    source = state / "jobs" / job_id
    record = json.loads((source / "job.json").read_bytes())
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.name != "job.json"]
    made = []
    for number in range(count):
        copy = secrets.token_hex(6)
        directory = state / "jobs" / copy
        (directory / "log").mkdir(parents=True)
        for file in files:
            shutil.copyfile(source / file, directory / file)
        os.mkfifo(directory / "ctl")
        spec = record["spec"] | {"request_id": f"request-{copy}", "name": f"job-{number}"}
        written = record | {"job_id": copy, "created": record["created"] + number + 1, "spec": spec}
        (directory / "job.json").write_text(json.dumps(written))
        made.append(copy)
    return made
