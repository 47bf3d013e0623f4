"""What the connections of one server share, and how a call gets at the connection that it came on."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from grpclib.protocol import Peer

from jobrunner.errors import LimitReached
from jobrunner.server.turns import Line, Turns
from jobrunner.wire.keepalive import PatientConnection

if TYPE_CHECKING:
    from jobrunner.bounds import Bounds
    from jobrunner.server.account import Account
    from jobrunner.server.http2 import ServerProtocol
    from jobrunner.server.limits import Rate

__all__ = ["ServerConnection", "ServerPeer", "Shared"]


@dataclass(eq=False, slots=True)
class Shared:
    """What the connections of one server have in common."""

    bounds: Bounds
    frames: Rate
    """How many small ones each user may send."""
    account: Account
    turns: Turns = field(default_factory=Turns)
    """Of users."""
    live: set[ServerProtocol] = field(default_factory=set)
    """The connections, which enter and leave by themselves."""
    calls: Counter[str] = field(default_factory=Counter)
    """At once, by user."""
    held: Counter[str] = field(default_factory=Counter)
    """Bytes of the messages of unfinished calls, by user: as long as they were said to be, whether or not they are there."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when one of them has left, and when a call is over."""

    def began(self, user: str) -> None:
        """A call has."""
        self.calls[user] += 1

    def over(self, user: str) -> None:
        """A call is; who has none is forgotten."""
        self.calls[user] -= 1
        if not self.calls[user]:
            del self.calls[user], self.held[user]

    def hold(self, user: str, before: int, size: int) -> None:
        """A call's message is so long, after one that was. Raises LimitReached."""
        most = self.bounds.max_messages_per_user
        if size > before and self.held[user] + size - before > most:
            reason = f'the messages of user "{user}" that are under way are longer than {most} bytes together; try again in 1 s'
            raise LimitReached("read request", "max_messages_per_user", reason, retry_after=1.0)
        self.held[user] += size - before


class ServerPeer(Peer):
    """Who is at the other end of a connection, and the connection itself: what a call's hooks are given."""

    def __init__(self, protocol: ServerProtocol) -> None:
        super().__init__(protocol.transport)
        self.protocol = protocol


class ServerConnection(PatientConnection):
    """grpclib's connection, which knows its protocol."""

    protocol: ServerProtocol
    line: Line
    """Calls that wait until the peer has read something of any of them."""

    def get_peer(self) -> ServerPeer:
        return ServerPeer(self.protocol)

    def dead(self) -> None:
        self.protocol.cut("it answers no PING, and nothing has moved either", "keepalive")
