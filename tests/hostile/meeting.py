"""Where a job and somebody outside meet: a volume, a socket in it, and what can be handed over there."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from typing import Self

from jobrunner.shim.launch import VolumeMount
from tests.support.timing import at_most


class Meeting:
    """A directory that a job has as a volume, and a socket in it that the test listens at."""

    inside = "/volumes/shared/socket"

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(dir="/var/tmp")
        self.directory = Path(self._temporary.name)
        self.directory.chmod(0o777)
        self.volume = VolumeMount(self._temporary.name, "/volumes/shared")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.directory / "socket"))
        (self.directory / "socket").chmod(0o777)
        self.listener.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        self._temporary.cleanup()


def take_over(listener: socket.socket) -> tuple[socket.socket, int]:
    """The connection of a job, and the descriptor that it hands over."""
    listener.settimeout(at_most(20))
    connection, _ = listener.accept()
    _, descriptors, _, _ = socket.recv_fds(connection, 64, 1)
    return connection, descriptors[0]
