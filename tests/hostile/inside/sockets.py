"""Attacks on what listens on the host, and with what can be handed over a socket."""

from __future__ import annotations

import array
import os
import socket
import time

from tests.hostile.inside.base import attack


@attack
def connect_unix(path: str) -> str:
    """A name that begins with @ is an abstract one."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(f"\0{path[1:]}" if path.startswith("@") else path)
    return "connected"


@attack
def connect_tcp(host: str, port: str) -> str:
    socket.create_connection((host, int(port)), 5).close()
    return "connected"


def hand_over(path: str, descriptor: int) -> str:
    """To whoever listens at a socket in a directory that both see; until that has enough of us."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        peer.sendmsg([b"take it"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))])
        peer.recv(1)
    return "handed over"


@attack
def hand_over_output(path: str) -> str:
    return hand_over(path, 1)


@attack
def hand_over_directory(path: str) -> str:
    """Our own, open for everybody."""
    os.makedirs("below/inner")
    for directory in (".", "below", "below/inner"):
        os.chmod(directory, 0o777)
    return hand_over(path, os.open("below", os.O_RDONLY | os.O_DIRECTORY))


@attack
def write_terminal(path: str) -> str:
    """Somebody else's terminal."""
    fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    os.write(fd, b"boo")
    os.close(fd)
    return "written"


@attack
def serve_forever() -> str:
    with socket.create_server(("127.0.0.1", 0)):
        time.sleep(600)
    return "served"
