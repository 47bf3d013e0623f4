"""The file `stop`: a stop that was asked for, durable before the shim is told (docs/formats.md, Stop)."""

from __future__ import annotations

from dataclasses import dataclass

from jobrunner.shim.items import pack_items, parse_items

__all__ = ["StopRequest", "pack_stop", "parse_stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequest:
    """`reason` is `stopped` or `shutdown`; `grace` in seconds; `by` is who asked."""

    reason: str
    signal: int
    grace: float
    by: str = ""


def pack_stop(request: StopRequest) -> bytes:
    grace_ms = str(round(request.grace * 1000))
    items = [("reason", request.reason), ("signal", str(request.signal)), ("grace-ms", grace_ms), ("by", request.by)]
    return pack_items("jobrunner-stop", items)


def parse_stop(raw: bytes) -> StopRequest:
    """ValueError if it is no stop list of this version."""
    items = dict(parse_items("jobrunner-stop", raw))
    try:
        return StopRequest(
            reason=items["reason"], signal=int(items["signal"]), grace=int(items["grace-ms"]) / 1000, by=items.get("by", "")
        )
    except KeyError as exc:
        raise ValueError(f"item {exc} is missing") from exc
