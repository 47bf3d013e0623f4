"""The server's own log, on standard error: lines for people, or JSON for programs.

What comes from a peer cannot pretend to be another line, nor tell a terminal anything: what cannot be printed is escaped.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

__all__ = ["begin"]


class _Text(logging.Formatter):
    """One line, and a traceback below it if there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        text = record.message
        record.message = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
        return super().formatMessage(record)


class _Json(logging.Formatter):
    """One object to a line: `time`, `level`, `logger`, `message`, and `error`, a traceback, if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        known = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            known["error"] = self.formatException(record.exc_info)
        return json.dumps(known)


def begin(level: str, form: str) -> None:
    """Log from here on, all that is at least this important."""
    logging.basicConfig(level=level.upper(), stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Json() if form == "json" else _Text("%(asctime)s %(levelname)s %(name)s: %(message)s"))
