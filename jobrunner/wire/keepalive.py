"""Whether the peer is still there: grpclib's PINGs, with the patience that they lack.

A PING waits behind what was sent before it, and its answer behind what the peer has sent: on a slow line for longer than a dead
peer is waited for. As long as bytes arrive at either end, the answer is on the way.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, Self

from grpclib.protocol import Connection

__all__ = ["KEEPALIVE", "PatientConnection"]

KEEPALIVE: dict[str, Any] = {
    "_keepalive_time": 20,
    "_keepalive_timeout": 10,
    "_keepalive_permit_without_calls": True,
    "_http2_max_pings_without_data": 0,
    "_http2_min_sent_ping_interval_without_data": 10,
}
"""Of a grpclib configuration, in seconds: a dead peer is found within 30 s."""
ARRIVED = struct.Struct("=QQ")
ARRIVED_AT = 120
"""In the kernel's `tcp_info` (linux/tcp.h): bytes that the peer has acknowledged, and that have come from it."""
TRICKLE = 1024
"""Bytes that tell nothing: a PING itself, and what a kernel says where the process hangs."""


class PatientConnection(Connection):
    """grpclib's connection, whose peer is dead only if nothing moves either."""

    @classmethod
    def instead_of(cls, made: Connection) -> Self:
        """Of the one that grpclib has just made, and goes on with it."""
        assert made._ping_handle is not None
        made._ping_handle.cancel()
        own = cls(made._connection, made._transport, config=made._config)
        own.initialize()
        return own

    def moved(self) -> int:
        """Bytes that have arrived so far, here and at the peer: one whose windows are small, or full, says nothing for long."""
        connection: socket.socket | None = self._transport.get_extra_info("socket")
        if connection is None:
            return 0  # it has just been closed
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, ARRIVED_AT + ARRIVED.size)
        return sum(ARRIVED.unpack_from(told, ARRIVED_AT))

    def _ping(self) -> None:
        waiting = self._close_by_ping_handler
        super()._ping()
        if waiting is None and self._close_by_ping_handler is not None:
            self._close_by_ping_handler.cancel()
            self._wait_for_answer()

    def _wait_for_answer(self) -> None:
        """`ping_ack_process` ends it."""
        seconds = self._config._keepalive_timeout
        self._close_by_ping_handler = asyncio.get_running_loop().call_later(seconds, self._give_up, self.moved())

    def _give_up(self, before: int) -> None:
        if self.moved() - before > TRICKLE:
            self._wait_for_answer()
        else:
            self.dead()

    def dead(self) -> None:
        """The peer is."""
        self.close()
