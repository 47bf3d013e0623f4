"""The SDK's reader against a peer that answers as the test says: bounds, endings, and streams that break off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from jobrunner import Gap, JobRunnerError, Stream, WouldBlock
from jobrunner.client.reader import PREFETCH
from jobrunner.errors import InternalError, JobNotFound, OffsetOutOfRange, Unavailable
from jobrunner.output import Begin, Chunk, End, OutputReader
from jobrunner.wire.convert import output_to_wire
from jobrunner.wire.status import error_to_wire
from tests.support.http2 import framed
from tests.support.peer import Output, peer_client

if TYPE_CHECKING:
    from pathlib import Path

JOB = "0123456789ab"
BLOCK = bytes(range(256)) * 255


def chunk(data: bytes, offset: int, stream: Stream = Stream.STDOUT) -> Chunk:
    return Chunk(stream, data, offset, 1.5)


def sends(*parts: Chunk | Gap | Begin | End) -> Any:
    """An answer that sends these and ends with OK."""

    async def answer(stream: Output) -> None:
        await stream.recv_message()
        for part in parts:
            await stream.send_message(output_to_wire(part))

    return answer


async def test_parts_come_in_order_and_the_end_is_kept(tmp_path: Path) -> None:
    parts: list[Chunk | Gap | End] = [chunk(b"a", 0), chunk(b"b", 1, Stream.STDERR), Gap(2, 9, "dropped"), chunk(b"c", 10)]
    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=sends(*parts, End(11))) as (client, _), client.get(JOB).log() as reader:
            assert [(part, reader.offset) async for part in reader] == list(zip(parts, (1, 2, 10, 11), strict=True))
            assert reader.end == End(11)
            assert reader.offset == 11


async def test_an_end_that_comes_at_once_with_the_servers_goodbye_is_the_end(tmp_path: Path) -> None:
    parts: list[Chunk | Gap | End] = [chunk(BLOCK, at * len(BLOCK)) for at in range(4)]

    async def answer(stream: Output) -> None:
        await stream.recv_message()
        for part in [*parts, End(4 * len(BLOCK))]:
            await stream.send_message(output_to_wire(part))
        await stream.send_trailing_metadata()
        connection = stream._stream.connection
        connection._connection.close_connection()
        connection.flush()
        connection.close()

    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=answer) as (client, _), client.get(JOB).log() as reader:
            assert b"".join([part.data async for part in reader if isinstance(part, Chunk)]) == BLOCK * 4
            assert reader.end == End(4 * len(BLOCK))


async def test_a_stream_that_stops_without_its_end_is_an_error(tmp_path: Path) -> None:
    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=sends(chunk(b"abc", 0))) as (client, _), client.get(JOB).log() as reader:
            assert await anext(reader) == chunk(b"abc", 0)
            with pytest.raises(InternalError, match=f"cannot read log of job {JOB}: it stopped at offset 3 without its end"):
                await anext(reader)
            assert reader.end is None


async def test_a_connection_that_is_lost_is_an_error_that_tells_where_to_go_on(tmp_path: Path) -> None:
    received = anyio.Event()

    async def answer(stream: Output) -> None:
        await stream.send_message(output_to_wire(chunk(b"abc", 0)))
        await received.wait()
        stream._stream._transport.abort()

    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=answer) as (client, _), client.get(JOB).log() as reader:
            assert await anext(reader) == chunk(b"abc", 0)
            received.set()
            with pytest.raises(Unavailable, match="lost the connection to 127.0.0.1:"):
                await anext(reader)
            assert reader.offset == 3


@pytest.mark.parametrize("error", [JobNotFound(JOB), OffsetOutOfRange(JOB, 9, 3), Unavailable("cannot read log: shutting down")])
async def test_the_server_s_error_comes_out_as_the_library_s_class(tmp_path: Path, error: JobRunnerError) -> None:
    told = error_to_wire(error)

    async def answer(stream: Output) -> None:
        await stream.send_message(output_to_wire(chunk(b"abc", 0)))
        await stream.send_trailing_metadata(status=told.status, status_message=told.message, metadata=told.trailer)

    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=answer) as (client, _), client.get(JOB).log() as reader:
            await anext(reader)
            with pytest.raises(type(error)) as caught:
                await anext(reader)
    assert caught.value.message == error.message


async def test_an_error_after_which_the_server_closes_at_once_is_not_taken_for_a_clean_end(tmp_path: Path) -> None:
    async def answer(stream: Output) -> None:
        await stream.send_message(output_to_wire(chunk(b"abc", 0)))
        await stream.send_trailing_metadata(status=Status.UNAVAILABLE, status_message="cannot read log: shutting down")
        stream._stream._transport.close()

    for number in range(10):
        with anyio.fail_after(10):
            async with peer_client(tmp_path / str(number), output=answer) as (client, _), client.get(JOB).log() as reader:
                await anext(reader)
                with pytest.raises(Unavailable):
                    await anext(reader)


async def test_next_nowait_says_when_nothing_is_there_yet(tmp_path: Path) -> None:
    go_on = anyio.Event()

    async def answer(stream: Output) -> None:
        await stream.send_message(output_to_wire(chunk(b"abc", 0)))
        await go_on.wait()
        await stream.send_message(output_to_wire(End(3)))

    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=answer) as (client, _), client.get(JOB).log() as reader:
            with pytest.raises(WouldBlock):
                reader.next_nowait()
            assert await anext(reader) == chunk(b"abc", 0)
            with pytest.raises(WouldBlock):
                reader.next_nowait()
            go_on.set()
            with pytest.raises(StopAsyncIteration):
                await anext(reader)
            assert reader.next_nowait() is None


async def test_lines_are_put_together_across_chunks_and_given_without_waiting(tmp_path: Path) -> None:
    parts: list[Chunk | Gap | End] = [chunk(b"on", 0), chunk(b"e\ntwo\nthr", 2), chunk(b"ee", 11), End(13)]
    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=sends(*parts)) as (client, _), client.get(JOB).log() as reader:
            first = await reader.next_line()
            second = reader.next_line_nowait()
            assert first is not None
            assert second is not None
            assert [first.data, second.data] == [b"one\n", b"two\n"]
            last = await reader.next_line()
            assert last is not None
            assert (last.data, last.offset) == (b"three", 8)
            assert await reader.next_line() is None


async def test_no_more_is_received_than_the_bound_while_nobody_takes(tmp_path: Path) -> None:
    window = 1 << 20
    sent = 0
    stuck = anyio.Event()

    async def answer(stream: Output) -> None:
        nonlocal sent
        for number in range(200):
            with anyio.move_on_after(1) as scope:
                await stream.send_message(output_to_wire(chunk(BLOCK, number * len(BLOCK))))
            if scope.cancelled_caught:
                stuck.set()
                return
            sent += len(BLOCK)

    with anyio.fail_after(20):
        async with peer_client(tmp_path, output=answer) as (client, _), client.get(JOB).log() as reader:
            with pytest.raises(WouldBlock):
                reader.next_nowait()
            await stuck.wait()
    assert PREFETCH < sent <= PREFETCH + window + 2 * len(BLOCK)


async def test_a_wait_that_is_cancelled_loses_nothing(tmp_path: Path) -> None:
    pause = anyio.Event()

    async def answer(stream: Output) -> None:
        for number in range(50):
            await stream.send_message(output_to_wire(chunk(b"%03d\n" % number, number * 4)))
            with anyio.move_on_after(0.002):
                await pause.wait()
        await stream.send_message(output_to_wire(End(200)))

    data = b""
    with anyio.fail_after(20):
        async with peer_client(tmp_path, output=answer) as (client, _), client.get(JOB).log() as reader:
            while reader.end is None:
                with anyio.move_on_after(0.001):
                    async for part in reader:
                        assert isinstance(part, Chunk)
                        data += part.data
    assert data == b"".join(b"%03d\n" % number for number in range(50))


async def test_closing_the_reader_cancels_the_call_on_the_server(tmp_path: Path) -> None:
    cancelled = anyio.Event()

    async def answer(stream: Output) -> None:
        await stream.send_message(output_to_wire(chunk(b"abc", 0)))
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=answer) as (client, _):
            reader = client.get(JOB).log()
            await anext(reader)
            await reader.aclose()
            await reader.aclose()
            await cancelled.wait()
            with pytest.raises(JobRunnerError, match="the reader is closed"):
                await anext(reader)


async def test_a_message_that_is_none_is_an_error(tmp_path: Path) -> None:
    async def answer(stream: Output) -> None:
        await stream.recv_message()
        await stream.send_initial_metadata()
        await stream._stream.send_data(b"\0\0\0\0\3\xff\xff\xff")

    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=answer) as (client, _), client.get(JOB).log() as reader:
            with pytest.raises(InternalError, match="unexpected answer from 127.0.0.1:"):
                await anext(reader)


async def test_an_unexpected_error_of_the_server_is_internal(tmp_path: Path) -> None:
    async def answer(stream: Output) -> None:
        raise GRPCError(Status.UNKNOWN, "Internal Server Error")

    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=answer) as (client, _), client.get(JOB).log() as reader:
            with pytest.raises(InternalError, match=f"cannot read log of job {JOB}: Internal Server Error"):
                await anext(reader)


def raw_answer(*frames: bytes, status: bool = True) -> Any:
    """An answer whose DATA frames have these bytes; without a status its last frame ends it."""

    async def answer(stream: Output) -> None:
        await stream.recv_message()
        await stream.send_initial_metadata()
        connection, number = stream._stream.connection, stream._stream.id or 0
        for data in frames:
            connection._connection.send_data(number, data, end_stream=not status and data is frames[-1])
            connection.flush()
        if status:
            await stream.send_trailing_metadata()
        else:
            await anyio.sleep_forever()

    return answer


async def test_frames_without_a_byte_end_nothing(tmp_path: Path) -> None:
    message, end = (framed(bytes(output_to_wire(part))) for part in (chunk(b"abc", 0), End(3)))
    frames = [b"", message[:3], b"", message[3:9], b"", message[9:], b"", b"", end, b""]
    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=raw_answer(*frames)) as (client, _), client.get(JOB).log() as reader:
            assert [part async for part in reader] == [chunk(b"abc", 0)]
            assert reader.end == End(3)


@pytest.mark.parametrize("cut", [3, 9, None], ids=["in-a-prefix", "in-a-message", "between-messages"])
async def test_an_answer_that_ends_without_a_status_is_an_error_and_not_waited_for(tmp_path: Path, cut: int | None) -> None:
    message = framed(bytes(output_to_wire(chunk(b"abc", 0))))
    answer = raw_answer(message[:cut], status=False)
    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=answer) as (client, _), client.get(JOB).log() as reader:
            with pytest.raises(InternalError, match="Missing grpc-status"):
                _ = [part async for part in reader]


async def test_what_a_server_may_say_besides_is_passed_over(tmp_path: Path) -> None:
    """An alternative service (RFC 7838)."""

    async def answer(stream: Output) -> None:
        connection = stream._stream.connection
        connection._connection.advertise_alternative_service(b'h2=":1"', origin=b"https://localhost")
        connection.flush()
        await sends(chunk(b"abc", 0), End(3))(stream)

    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=answer) as (client, _), client.get(JOB).log() as reader:
            assert [part async for part in reader] == [chunk(b"abc", 0)]


ERR = Stream.STDERR
BROKEN: dict[str, tuple[dict[str, Any], list[Chunk | Gap | Begin | End], str]] = {
    "twice": ({}, [chunk(b"abc", 0), chunk(b"abc", 0)], "bytes at 0 after those before 3"),
    "in-part-twice": ({}, [chunk(b"abc", 0), chunk(b"cd", 2)], "bytes at 2 after those before 3"),
    "hole": ({}, [chunk(b"abc", 0), chunk(b"e", 4)], "bytes at 4 where 3 was next"),
    "hole-at-the-beginning": ({}, [chunk(b"b", 1)], "bytes at 1 where 0 was next"),
    "before-the-offset": ({"offset": 5}, [chunk(b"abc", 0)], "bytes at 0 after those before 5"),
    "past-the-offset": ({"offset": 5}, [chunk(b"abc", 1 << 61)], f"bytes at {1 << 61} where 5 was next"),
    "gap-backwards": ({}, [chunk(b"abc", 0), Gap(1, 9, "dropped")], "a gap at 1 after those before 3"),
    "gap-of-nothing": ({}, [chunk(b"abc", 0), Gap(3, 2, "dropped")], "a gap from 3 to 2"),
    "gap-ahead": ({}, [chunk(b"abc", 0), Gap(4, 9, "dropped")], "a gap at 4 where 3 was next"),
    "after-a-gap": ({}, [Gap(0, 9, "dropped"), chunk(b"abc", 9)], "bytes at 9 after those before 10"),
    "end-too-far": ({}, [chunk(b"abc", 0), End(4)], "its end at 4 where 3 was next"),
    "end-too-soon": ({}, [chunk(b"abc", 0), End(2)], "its end at 2 after those before 3"),
    "end-of-another": ({"offset": 9}, [End(3)], "its end at 3 after those before 9"),
    "other-stream": ({"streams": {ERR}}, [chunk(b"abc", 0)], "stdout was not asked for"),
    "one-stream-twice": ({"streams": {ERR}}, [chunk(b"a", 9, ERR), chunk(b"a", 9, ERR)], "bytes at 9 after those before 10"),
    "begin-unasked": ({}, [Begin(9, 9, 9)], "a beginning at 9 that was not asked for"),
    "begin-late": ({"since": 1.0}, [chunk(b"a", 0), Begin(0, 0, 0)], "a beginning at 0 that was not asked for"),
    "begin-backwards": ({"since": 1.0, "offset": 9}, [Begin(3, 3, 3)], "a beginning at 3 that was not asked for"),
    "begin-after-its-streams": ({"tail": 1}, [Begin(5, 4, 9)], "a beginning at 5 that was not asked for"),
    "tail-hole": ({"tail": 1}, [Begin(2, 2, 5), chunk(b"a", 6)], "bytes at 6 where 2 was next"),
    "since-twice": ({"since": 1.0}, [Begin(2, 2, 2), chunk(b"a", 6), chunk(b"b", 6)], "bytes at 6 after those before 7"),
}


async def show(reader: OutputReader, shown: list[Chunk | Gap]) -> None:
    async for part in reader:
        shown.append(part)  # noqa: PERF401 - what comes before an error counts


@pytest.mark.parametrize("case", BROKEN)
async def test_what_cannot_come_next_is_an_error_and_nothing_of_it_is_shown(tmp_path: Path, case: str) -> None:
    asked, parts, told = BROKEN[case]
    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=sends(*parts, chunk(b"more", 1 << 40))) as (client, _):
            shown: list[Chunk | Gap] = []
            async with client.get(JOB).log(**asked) as reader:
                with pytest.raises(InternalError, match=f"cannot read log of job {JOB}: the server has sent {told}, at offset"):
                    await show(reader, shown)
            assert shown == [part for part in parts[:-1] if isinstance(part, Chunk | Gap)]
            assert reader.end is None


async def test_what_comes_after_the_end_is_not_shown(tmp_path: Path) -> None:
    parts: list[Chunk | End] = [chunk(b"abc", 0), End(3), chunk(b"more", 3)]
    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=sends(*parts)) as (client, _), client.get(JOB).log() as reader:
            assert [part async for part in reader] == parts[:1]
            assert reader.end == End(3)


RIGHT: dict[str, tuple[dict[str, Any], list[Chunk | Gap | Begin | End]]] = {
    "one-stream": ({"streams": {ERR}}, [chunk(b"a", 5, ERR), Gap(9, 11, "lost"), chunk(b"b", 12, ERR), End(99)]),
    "tail": ({"tail": 1}, [Begin(2, 2, 5), chunk(b"out", 2), chunk(b"err", 5, ERR), End(8)]),
    "tail-of-two-places": ({"tail": 1}, [Begin(2, 2, 9), chunk(b"o", 2), chunk(b"e", 9, ERR), End(10)]),
    "since": ({"since": 1.0}, [Begin(2, 2, 2), chunk(b"a", 6), chunk(b"b", 7), End(8)]),
    "since-that-never-came": ({"since": 1.0}, [Begin(2, 2, 2), End(8)]),
    "no-last-line": ({"tail": 0}, [Begin(8, 8, 8), End(8)]),
    "nothing": ({}, [End(0)]),
}


@pytest.mark.parametrize("case", RIGHT)
async def test_what_may_come_next_is_shown(tmp_path: Path, case: str) -> None:
    asked, parts = RIGHT[case]
    with anyio.fail_after(10):
        async with peer_client(tmp_path, output=sends(*parts)) as (client, _), client.get(JOB).log(**asked) as reader:
            assert [part async for part in reader] == [part for part in parts if isinstance(part, Chunk | Gap)]
            assert reader.end == parts[-1]
