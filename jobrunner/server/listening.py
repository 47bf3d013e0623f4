"""Listening sockets: who is accepted, how many at once, and when no more."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

from jobrunner.errors import HostError
from jobrunner.units import parse_address

__all__ = ["address_of", "bound_address", "listen", "stop_accepting"]

BACKLOG = 1024
SILENT = 1
"""Seconds that a connection has to say something before it is accepted all the same, and its time is taken (tcp(7))."""


async def listen(make: Callable[[], asyncio.BaseProtocol], address: str, accepts: int) -> asyncio.Server:
    """Accept connections on HOST:PORT, so many in one turn of the loop at most. Raises HostError.

    asyncio's one `backlog` is how many the kernel keeps, and also how many are accepted before anyone is heard. And a client speaks
    first, in TLS as in HTTP: those that say nothing are the kernel's as well, for a while.
    """
    host, port = parse_address(address)
    try:
        server = await asyncio.get_running_loop().create_server(make, host, port, backlog=accepts)
        for listening in server.sockets:
            with socket.socket(fileno=os.dup(listening.fileno())) as same:
                same.listen(BACKLOG)  # again, which changes the number (listen(2))
                same.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, SILENT)
    except OSError as exc:
        raise HostError(f"cannot listen on {address}: {exc.strerror or exc}") from exc
    return server


def bound_address(server: asyncio.Server, address: str) -> str:
    """The HOST:PORT that was asked for, with the port that it has become."""
    host, _, _ = address.rpartition(":")
    return f"{host}:{server.sockets[0].getsockname()[1]}"


async def stop_accepting(server: asyncio.Server) -> None:
    """Close the listening sockets; each connection that was accepted has been made then, and its protocol knows its transport.

    asyncio makes the transport in the next turn of the loop, and of none once its server is closed: such a socket would be left to
    the garbage collector, and so would its TLS. The protocol is told in the turn after that.
    """
    for listening in server.sockets:
        asyncio.get_running_loop().remove_reader(listening.fileno())
    try:
        await asyncio.sleep(0)
    finally:
        server.close()
    await asyncio.sleep(0)


def address_of(peername: Any) -> str:
    """HOST:PORT of a socket's peer name, for messages."""
    if not isinstance(peername, tuple):
        return "an unknown address"
    host, port = peername[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
