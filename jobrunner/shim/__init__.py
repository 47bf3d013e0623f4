"""The C helper, and its formats seen from Python: the item list, the launcher's report, the stop file, the exit record.

`main.c` opens with the theory of operation; docs/formats.md has the formats.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["binary_path"]


def binary_path() -> Path:
    """The compiled helper, beside this file; whether it is there is for a check of the host to tell."""
    return Path(__file__).with_name("jobrunner-shim")
