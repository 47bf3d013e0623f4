"""What a service manager is told, and asks: sd_notify(3) and the watchdog of systemd.service(5), over its datagram socket.

Without a service manager, NOTIFY_SOCKET is not set and nothing is told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping

__all__ = ["ServiceManager"]

logger = logging.getLogger(__name__)


class ServiceManager:
    """The service manager that started this process, if one did."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environ.get("WATCHDOG_USEC", "")
        self._watchdog = int(usec) / 1e6 if ours and usec.isdigit() else 0.0

    def __repr__(self) -> str:
        return f"<ServiceManager {self._address!r} watchdog {self._watchdog:g} s>"

    def ready(self, status: str) -> None:
        """The service has started; `status` is one line for whoever asks."""
        self._tell(f"READY=1\nSTATUS={status}")

    def stopping(self, status: str, seconds: float) -> None:
        """The service ends, within these seconds."""
        self._tell(f"STOPPING=1\nSTATUS={status}\nEXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    async def keep_alive(self) -> None:
        """As long as the event loop runs, say so, twice in the time that the manager waits. Returns at once if nobody waits."""
        while self._address and self._watchdog:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog / 2)

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as manager:
                manager.sendto(state.encode(), self._address)
        except OSError as exc:
            logger.warning("cannot tell the service manager %r: %s", state.splitlines()[0], exc.strerror)
