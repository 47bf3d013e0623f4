"""The least that fan-out over mutual TLS can cost in Python: asyncio's streams, without HTTP/2, gRPC or a log.

`python -m tests.bench.plain serve CA CERT KEY BYTES` prints its address and sends as many to each connection that says a line;
`python -m tests.bench.plain read ADDRESS CA CERT KEY COUNT BYTES` reads like `tests.bench.follower` does.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from jobrunner.tls import client_context, server_context

CHUNK = 1 << 16


async def _serve(ca: str, cert: str, key: str, size: int) -> None:
    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        for start in range(0, size, CHUNK):
            writer.write(bytes(min(CHUNK, size - start)))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(send, "127.0.0.1", 0, ssl=server_context(Path(ca), Path(cert), Path(key)))
    host, port = server.sockets[0].getsockname()
    print(f"{host}:{port}", flush=True)
    await server.serve_forever()


async def _read(address: str, ca: str, cert: str, key: str, count: int, size: int) -> None:
    host, _, port = address.rpartition(":")
    context = client_context(Path(ca), Path(cert), Path(key))
    pairs = [await asyncio.open_connection(host, int(port), ssl=context) for _ in range(count)]
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    whole = await asyncio.gather(*(_count(reader, writer, size) for reader, writer in pairs))
    print("read" if all(whole) else "bytes are missing", flush=True)


async def _count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int) -> bool:
    writer.write(b"go\n")
    got = 0
    while data := await reader.read(4 * CHUNK):
        got += len(data)
    writer.close()
    return got == size


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _, _, CA, CERT, KEY, BYTES = sys.argv
        asyncio.run(_serve(CA, CERT, KEY, int(BYTES)))
    else:
        _, _, ADDRESS, CA, CERT, KEY, COUNT, BYTES = sys.argv
        asyncio.run(_read(ADDRESS, CA, CERT, KEY, int(COUNT), int(BYTES)))
