"""Bars of time, for hosts that are slower than those the tests were written on: an emulated machine sets JOBRUNNER_TIME_FACTOR.

Only what must be over soon is stretched, never what must have lasted.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import anyio

__all__ = ["FACTOR", "at_most", "fail_after"]

FACTOR = float(os.environ.get("JOBRUNNER_TIME_FACTOR", "1"))


def at_most(seconds: float) -> float:
    """What takes this long at most, takes so long here."""
    return seconds * FACTOR


def fail_after(seconds: float) -> AbstractContextManager[object]:
    """As anyio's, but stretched."""
    return anyio.fail_after(at_most(seconds))
