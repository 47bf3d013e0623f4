"""What arrived of a request."""

from __future__ import annotations

import os

from tests.hostile.inside.base import attack


@attack
def count(*args: str) -> str:
    return f"{len(args)} {len(os.environ)}"
