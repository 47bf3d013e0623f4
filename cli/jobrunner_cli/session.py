"""From the global options to an open client, and back to an exit code. The SDK is imported here, only when it is needed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from jobrunner.errors import ConfigError
from jobrunner.stdio import STDERR, STDOUT, write_all

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from jobrunner.client import JobClient
    from jobrunner.errors import JobRunnerError

__all__ = ["Settings", "connected", "say", "warn"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """The global options; empty if neither the option nor its variable is set."""

    address: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""
    key_passphrase_file: str = ""

    def client(self) -> JobClient:
        """ConfigError names what is missing."""
        from jobrunner.client import JobClient

        for name in ("address", "ca", "cert", "key"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} or JOBRUNNER_{name.upper()}", "neither is set")
        return JobClient(
            self.address, ca=self.ca, cert=self.cert, key=self.key, key_passphrase_file=self.key_passphrase_file or None, tell=_tell
        )


def connected(settings: Settings, work: Callable[[JobClient], Awaitable[T]]) -> T:
    """Run `work` with an open client. KeyboardInterrupt on Ctrl-C, unless the work sees to it."""
    # betterproto2 loads pydantic where there is one (typer has brought it), to ask whether our messages are made with it. They are
    # not, and an eighth of the time of `jobrunner status` would go there. This entry makes its import fail.
    sys.modules.setdefault("pydantic", None)  # type: ignore[arg-type]
    client = settings.client()

    import anyio

    async def opened() -> T:
        async with client:
            return await work(client)

    return anyio.run(opened)


def _tell(lost: JobRunnerError | None) -> None:
    """One line when the connection is lost, and one when it is back."""
    warn("connected again" if lost is None else f"{lost.message}; trying again")


def say(text: str) -> None:
    """A result, to standard output. Raises OutputClosed and OutputFailed."""
    write_all(STDOUT, _encoded(text))


def warn(text: str) -> None:
    """One line to standard error that says who speaks; never raises, for there is nobody left to tell."""
    try:
        write_all(STDERR, _encoded(f"jobrunner: {' '.join(text.splitlines())}"))
    except Exception:
        return


def _encoded(text: str) -> bytes:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return f"{text}\n".encode(encoding, "backslashreplace")
