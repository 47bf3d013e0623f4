"""Jobs that end the instant after their last write: the last byte is there, the follow ends, and the reason is right."""

from __future__ import annotations

from pathlib import Path

from jobrunner import Stream
from jobrunner.client import JobClient
from jobrunner.output import Chunk
from tests.bench.limit import at_once
from tests.soak.serving import served
from tests.soak.sizes import Sizes
from tests.support.timing import fail_after

__all__ = ["endings"]

AT_ONCE = 4
ENDS = (
    ("exit 0", "exited", "completed", 0),
    ("exit 3", "exited", "failed", 3),
    ("kill -9 $$", "signaled", "failed", None),
)


async def endings(directory: Path, sizes: Sizes) -> str:
    async with served(directory) as server, server.client() as client:
        await at_once(AT_ONCE, sizes.endings, lambda number: _one(client, number))
    return f"{sizes.endings} jobs ended the instant after their last write, with their last byte"


async def _one(client: JobClient, number: int) -> None:
    how, reason, status, code = ENDS[number % len(ENDS)]
    stream = (Stream.STDOUT, Stream.STDERR)[number // 3 % 2]
    words = f"{number} last words"
    with fail_after(30):
        job = await client.start("sh", "-c", f"printf '{words}' >&{1 if stream is Stream.STDOUT else 2}; {how}")
        async with job.log() as reader:
            parts = [part async for part in reader]
        data = b"".join(part.data for part in parts if isinstance(part, Chunk) and part.stream is stream)
        assert data == words.encode(), (number, parts)
        assert reader.end is not None and reader.end.info is not None
        info = reader.end.info
        assert reader.end.total_bytes == info.log_end == len(words)
        assert (info.end_reason, info.status, info.exit_code) == (reason, status, code), info
        await client.remove(job.job_id)
