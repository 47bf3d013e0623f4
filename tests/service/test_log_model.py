"""The log as a whole, across the network, against plain bytes: connections that are cut, servers that restart, any selection.

The shipped shim writes, the shipped server and client read. Failed writes are in tests/kernel/test_log_model.py.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jobrunner import Gap, JobSpec, Limits, Stream
from jobrunner.client import JobClient
from jobrunner.config import RunnerConfig, ServerConfig
from jobrunner.output import Chunk, OutputReader, Selection
from jobrunner.runner import JobRunner
from jobrunner.server.devcerts import make_certs
from jobrunner.server.process import running_server
from tests.kernel.test_log_model import JOB, LIMIT, WANTED, WRITE, Model
from tests.support.proxy import Proxy, proxy_to
from tests.support.timing import fail_after

pytestmark = [pytest.mark.requires("root"), pytest.mark.timeout(180)]

PYTHON = "/usr/bin/python3"


@dataclass(frozen=True)
class Filter:
    """A selection whose places and times are shares of what there is in the end."""

    streams: frozenset[Stream]
    begin: str
    at: float
    until: float | None

    def of(self, total: int, times: Sequence[float]) -> Selection:
        fields: dict[str, Any] = {"streams": self.streams, "follow": self.begin != "snapshot"}
        if self.begin in ("offset", "snapshot"):
            fields["offset"] = int(total * self.at)
        elif self.begin == "tail":
            fields["tail"] = int(40 * self.at)
        elif times:
            fields["since"] = times[int((len(times) - 1) * self.at)]
        if self.until is not None and times:
            until = times[int((len(times) - 1) * self.until)]
            fields["until"] = max(until, fields.get("since", until))
        return Selection(**fields)


FILTER = st.builds(
    Filter,
    streams=WANTED,
    begin=st.sampled_from(["offset", "snapshot", "tail", "since"]),
    at=st.floats(0, 1),
    until=st.one_of(st.none(), st.floats(0, 1)),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    path = tmp_path_factory.mktemp("model")
    make_certs(path)
    ca, cert, key = (path / name for name in ("ca.pem", "server.pem", "server.key"))
    return ServerConfig(runner=RunnerConfig(state_dir=path / "state"), listen="127.0.0.1:0", ca=ca, cert=cert, key=key)


@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    writes=st.lists(WRITE, max_size=20),
    live=st.tuples(WANTED, st.sampled_from([{}, {"tail": 3}, {"since": 0.0}]), st.integers(0, 4)),
    filters=st.lists(FILTER, min_size=3, max_size=6),
    restart=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_any_selection_through_cuts_and_restarts_equals_the_bytes(
    config: ServerConfig,
    writes: list[tuple[str, int]],
    live: tuple[frozenset[Stream], dict[str, Any], int],
    filters: list[Filter],
    restart: bool,
    seed: int,
) -> None:
    asyncio.run(_check(config, writes, live, filters, restart, random.Random(seed)))


async def _check(
    config: ServerConfig,
    writes: list[tuple[str, int]],
    live: tuple[frozenset[Stream], dict[str, Any], int],
    filters: list[Filter],
    restart: bool,
    chance: random.Random,
) -> None:
    model = Model.of(writes)
    wanted, begin, pause = live
    async with _cut_client(config, chance) as (client, proxy):
        async with _served(config, proxy) as runner:
            await client.server()  # nothing is tried again before the server was reached once
            spec = JobSpec(PYTHON, ("-c", JOB, json.dumps(writes), "-"), limits=Limits(output_limit=LIMIT))
            job_id = (await runner.start(spec)).job_id
            following = asyncio.create_task(_read(client.get(job_id).log(streams=wanted, **begin), pause))
            if not restart:
                await following
        async with _served(config, proxy) as runner:
            parts = await following
            await _check_filters(client, runner, job_id, filters, model)
            await runner.remove(job_id)
    if begin:
        _check_streams(model, parts, wanted)
    else:
        model.check(parts, 0, wanted)


async def _check_filters(client: JobClient, runner: JobRunner, job_id: str, filters: list[Filter], model: Model) -> None:
    """Each selection of the ended log: what the client is given is what is on the disk, and that is the model's."""
    job = await runner.get(job_id)
    whole = await _read(job.log(exact_times=True))
    missing = model.check(whole, 0, frozenset(Stream))
    assert missing == 0 or len(model.data) > LIMIT * 5 // 8, "nothing is dropped that has a place"
    times = [part.time for part in whole if isinstance(part, Chunk)]
    for one in filters:
        selection = one.of(len(model.data), times)
        here, there = await _read(job.read(selection)), await _read(client.get(job_id).read(selection))
        assert _bytes(there) == _bytes(here), selection
        for part in there:
            if isinstance(part, Chunk):
                assert part.data == model.data[part.offset : part.next_offset]
                assert part.stream in selection.streams


@asynccontextmanager
async def _served(config: ServerConfig, proxy: Proxy) -> AsyncIterator[JobRunner]:
    """A server behind the proxy; its jobs outlive it."""
    async with running_server(config) as running:
        proxy.target, proxy.refusing = running.address, False
        try:
            yield running.runner
        finally:
            proxy.refusing = True


@asynccontextmanager
async def _cut_client(config: ServerConfig, chance: random.Random) -> AsyncIterator[tuple[JobClient, Proxy]]:
    """A client each of whose connections is cut after some bytes; now and then more than a chunk fits in."""
    directory = config.ca.parent
    cert, key = directory / "admin.pem", directory / "admin.key"
    async with (
        proxy_to("127.0.0.1:1", lambda: chance.randint(8_000, 200_000)) as proxy,
        JobClient(proxy.address, ca=config.ca, cert=cert, key=key) as client,
    ):
        yield client, proxy


async def _read(reader: OutputReader, pause: int = 0) -> list[Chunk | Gap]:
    """All of it; after so many parts it stalls for a moment, so that what it wants next may be dropped meanwhile."""
    parts: list[Chunk | Gap] = []
    with fail_after(60):
        async with reader:
            async for part in reader:
                parts.append(part)
                if len(parts) == pause:
                    await asyncio.sleep(0.1)
    assert reader.end is not None
    return parts


def _check_streams(model: Model, parts: list[Chunk | Gap], wanted: frozenset[Stream]) -> None:
    """Each stream is whole from its own first byte on: the last lines of two streams need not begin at one place."""
    for stream in wanted:
        start = min((part.offset for part in parts if isinstance(part, Chunk) and part.stream is stream), default=None)
        if start is not None:
            own = [part for part in parts if (part.first >= start if isinstance(part, Gap) else part.stream is stream)]
            model.check(own, start, frozenset({stream}))


def _bytes(parts: list[Chunk | Gap]) -> dict[int, tuple[str, int]]:
    """Each offset with what stands there, or why it is missing; fails if one comes twice or too late."""
    found: dict[int, tuple[str, int]] = {}
    for part in parts:
        if isinstance(part, Gap):
            new = dict.fromkeys(range(part.first, part.last + 1), (part.reason, 0))
        else:
            new = {part.offset + index: (str(part.stream), byte) for index, byte in enumerate(part.data)}
        assert not found or min(new) > max(found)
        found |= new
    return found
