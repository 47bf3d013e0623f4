"""A TLS connection that is made, or nothing: who is cancelled on the way leaves no socket behind.

asyncio's `create_connection` leaves one in two places: its race of addresses (`happy_eyeballs_delay`) forgets the socket that has
just been connected, and a connection whose handshake has just been done says goodbye to the server for as long as that takes.
"""

from __future__ import annotations

import asyncio
import socket
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import anyio

if TYPE_CHECKING:
    import ssl

__all__ = ["TLS_SHUTDOWN_TIMEOUT", "Dialed", "dial"]

NEXT_ADDRESS = 0.25
"""Seconds that an address has before the next one is tried beside it (RFC 8305 section 5)."""
TLS_SHUTDOWN_TIMEOUT = 2.0


class Dialed(Protocol):
    """A protocol that keeps its transport."""

    transport: asyncio.Transport | None


Made = TypeVar("Made", bound=Dialed)


async def dial(host: str, port: int, context: ssl.SSLContext, protocol: Made, timeout: float) -> Made:
    """Put this protocol on a new connection. Raises OSError, ssl.SSLError and, after `timeout` seconds, TimeoutError."""
    with anyio.fail_after(timeout):
        connected = await _connected(host, port)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: cast("asyncio.BaseProtocol", protocol),
                sock=connected,
                ssl=context,
                server_hostname=host,
                ssl_handshake_timeout=timeout,
                ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT,
            )
        except BaseException:
            if protocol.transport is not None:
                protocol.transport.abort()
            connected.close()
            raise
    return protocol


async def _connected(host: str, port: int) -> socket.socket:
    """A socket to the first address that answers. Raises the error of the first one that failed if none does."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    sockets: list[socket.socket] = []
    errors: list[OSError] = []
    first: socket.socket | None = None

    async def attempt(family: int, address: Any, failed: anyio.Event) -> None:
        nonlocal first
        try:
            # TCP by name: asyncio turns Nagle's algorithm off for no other, and then each call waits 40 ms for an acknowledgement.
            sockets.append(own := socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            own.setblocking(False)
            await asyncio.get_running_loop().sock_connect(own, address)
        except OSError as exc:
            errors.append(exc)
            failed.set()
        else:
            first = first or own
            attempts.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as attempts:
            for family, address in _alternating(found):
                failed = anyio.Event()
                attempts.start_soon(attempt, family, address, failed)
                with anyio.move_on_after(NEXT_ADDRESS):
                    await failed.wait()
    except BaseException:
        first = None
        raise
    finally:
        for each in sockets:
            if each is not first:
                each.close()
    if first is None:
        raise errors[0]
    return first


def _alternating(found: list[Any]) -> list[tuple[int, Any]]:
    """What `getaddrinfo` has found, the families in turn: one that does not work is not tried to its end first (section 4)."""
    families: dict[int, list[tuple[int, Any]]] = {}
    for family, _, _, _, address in found:
        families.setdefault(family, []).append((family, address))
    return [each for each in chain.from_iterable(zip_longest(*families.values())) if each is not None]
