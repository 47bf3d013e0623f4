"""`jobrunnerd dev`: a server with throw-away certificates, and what its clients need to reach it."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from jobrunner.config import ServerConfig
from jobrunner.server import process
from jobrunner.server.devcerts import CLIENTS, make_certs
from jobrunner.settings import load_runner

__all__ = ["serve"]


def serve(directory: Path | None, listen: str, ready: Callable[[str], None]) -> None:
    """Serve from this directory, or a new one; `ready` hears the address when the clients' lines have been printed."""
    root = Path(tempfile.mkdtemp(prefix="jobrunner-dev-")) if directory is None else directory.absolute()
    if not (root / "ca.pem").exists():
        make_certs(root)
    if directory is None and os.geteuid() == 0 and (caller := os.environ.get("SUDO_UID", "")).isdecimal():
        _hand_over(root, int(caller))
    runner = load_runner(None, os.environ, {"state_dir": root / "state"})
    settings = ServerConfig(runner=runner, listen=listen, ca=root / "ca.pem", cert=root / "server.pem", key=root / "server.key")

    def tell(address: str) -> None:
        _tell_clients(root, address)
        ready(address)

    process.serve(settings, ready=tell)


def _hand_over(root: Path, uid: int) -> None:
    """The clients' keys to whom sudo(8) was called by; the server's and the CA's stay root's."""
    for user in CLIENTS:
        os.chown(root / f"{user}.key", uid, -1)
    root.chmod(0o711)


def _tell_clients(root: Path, address: str) -> None:
    """One line of shell for each role, also kept as files to source."""
    for user in CLIENTS:
        line = f"export {' '.join(f'{name}={shlex.quote(value)}' for name, value in _client(root, user, address).items())}"
        (root / f"{user}.env").write_text(f"{line}\n")
        print(f"# as {user}, also in {root / user}.env\n{line}\n", flush=True)


def _client(root: Path, user: str, address: str) -> Mapping[str, str]:
    return {
        "JOBRUNNER_ADDRESS": address,
        "JOBRUNNER_CA": str(root / "ca.pem"),
        "JOBRUNNER_CERT": str(root / f"{user}.pem"),
        "JOBRUNNER_KEY": str(root / f"{user}.key"),
    }
