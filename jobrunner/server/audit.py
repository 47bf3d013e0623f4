"""The audit log: who was let in, who was not, who called what, and how it ended. JSON, one object to a line.

    time, event, address, user, serial, role, call, rpc, job, bound, reason, outcome, seconds, times

`account` says which events there are. What a line does not know it leaves out. Written with one write(2), not synced: it outlives
the server's death, not the host's. Nothing of a request is in it but its path and the job's id: no command, no variable, no output.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from jobrunner.errors import ConfigError

__all__ = ["MAX_TEXT", "Audit"]

logger = logging.getLogger(__name__)

MAX_TEXT = 512
"""Characters of a field: a peer may have sent it."""


class Audit:
    """The log at one path; without a path nothing is written."""

    def __init__(self, path: Path | None) -> None:
        """ConfigError if it cannot be opened."""
        self._path = path
        self._fd = -1
        self._torn = False
        """Whether the file ends within a line: the disk was full."""
        self.failing = False
        """Whether the last line could not be written."""
        if path is not None:
            try:
                self._use(self._open(path))
            except OSError as exc:
                raise ConfigError(f"audit log {path}", exc.strerror or str(exc)) from exc

    def __repr__(self) -> str:
        return f"<Audit {self._path} {'failing' if self.failing else 'fine'}>"

    def reopen(self) -> None:
        """After it was renamed. The old file stays open if there can be no new one."""
        if self._path is None:
            return
        try:
            fd = self._open(self._path)
        except OSError as exc:
            logger.error("cannot open audit log %s: %s; the file from before stays in use", self._path, exc.strerror)
            return
        os.close(self._fd)
        self._use(fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, event: str, **fields: str | float) -> bool:
        """Whether it is written; also where there is no log to write. Fields that are empty are left out."""
        if self._fd < 0:
            return True
        known = {name: value[:MAX_TEXT] if isinstance(value, str) else value for name, value in fields.items() if value != ""}
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="microseconds"), "event": event, **known}) + "\n"
        data = ("\n" * self._torn + line).encode()
        try:
            written = os.write(self._fd, data)
            if written < len(data):
                self._torn = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as exc:
            if not self.failing:
                logger.error("cannot write audit log %s: %s; calls that change something are refused", self._path, exc.strerror)
            self.failing = True
            return False
        self._torn = False
        if self.failing:
            logger.warning("the audit log %s can be written again", self._path)
        self.failing = False
        return True

    def _use(self, fd: int) -> None:
        self._fd = fd
        size = os.fstat(fd).st_size
        self._torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"

    @staticmethod
    def _open(path: Path) -> int:
        # O_NONBLOCK: a FIFO that nobody reads is a log that cannot be written, and holds up nothing.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(path, flags, 0o600)
