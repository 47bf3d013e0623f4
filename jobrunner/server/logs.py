"""The server's own log, on standard error: lines for people, or JSON for programs.

What comes from a peer stands in a line in a form that cannot pretend to be another line (`%r`, or JSON's own escapes).
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

__all__ = ["begin"]


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
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if form == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_Json())
