"""Sizes, durations and addresses as people type them.

| typed | means |
|---|---|
| `4096`, `4096B` | bytes |
| `512k`, `512KB`, `100M`, `100MB`, `1G`, `1GB`, `1T`, `1TB` | powers of 1000 |
| `512Ki`, `512KiB`, `64Mi`, `64MiB`, `1GiB`, `1TiB` | powers of 1024 |
| `10`, `10s`, `250ms`, `1.5h`, `2m`, `1h30m`, `1d` | seconds, milliseconds, hours, minutes, days, and their sums |
"""

from __future__ import annotations

import re
from decimal import Decimal
from ipaddress import ip_address

__all__ = ["format_duration", "format_size", "is_loopback", "parse_address", "parse_duration", "parse_size"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE | re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_MAX_TEXT = 64
"""Longer texts are refused before they are parsed: nobody types them."""
_SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}


def parse_size(text: str) -> int:
    """Bytes. ValueError, with the reason, for what is no size; a fraction of a byte is dropped."""
    match = _SIZE.fullmatch(text.strip()) if len(text) <= _MAX_TEXT else None
    if match is None:
        raise ValueError(f"{text[:_MAX_TEXT]!r} is no size such as 1048576, 512k, 100MB or 64MiB")
    number, prefix, binary = match.groups()
    return int(Decimal(number) * (1024 if binary else 1000) ** _POWERS[(prefix or "").lower()])


def format_size(size: int) -> str:
    """The shortest text that `parse_size` reads as exactly this size, or else three decimals of it: `64MiB`, `100MB`, `1.23GB`."""
    for unit, suffix in ((1024, "iB"), (1000, "B")):
        for prefix in "TGMK":
            factor = unit ** _POWERS[prefix.lower()]
            if size and size % factor == 0:
                return f"{size // factor}{prefix}{suffix}"
    for prefix in "TGMK":
        factor = 1000 ** _POWERS[prefix.lower()]
        if size >= factor:
            return f"{size / factor:.3f}".rstrip("0").rstrip(".") + f"{prefix}B"
    return f"{size}B"


def parse_duration(text: str) -> float:
    """Seconds. ValueError, with the reason, for what is no duration."""
    text = text.strip()
    if len(text) <= _MAX_TEXT:
        if _NUMBER.fullmatch(text):
            return float(text)
        parts = _DURATION_PART.findall(text)
        units = [unit for _, unit in parts]
        if parts and "".join(number + unit for number, unit in parts) == text and len(set(units)) == len(units):
            return float(sum(Decimal(number) * _SECONDS[unit] for number, unit in parts))
    raise ValueError(f"{text[:_MAX_TEXT]!r} is no duration such as 10, 250ms, 1.5s, 2m or 1h30m")


def format_duration(seconds: float) -> str:
    """As `parse_duration` reads it, to the millisecond: `250ms`, `1.5s`, `1h30m`."""
    total = round(seconds * 1000)
    if total < 1000:
        return f"{total}ms"
    minutes, millis = divmod(total, 60_000)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{value}{unit}" for value, unit in ((days, "d"), (hours, "h"), (minutes, "m")) if value]
    if millis:
        parts.append(f"{millis / 1000:g}s")
    return "".join(parts)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[::1]:PORT`. ValueError, with the reason, for what is none."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or host in ("", "[]") or (":" in host and not bracketed):
        raise ValueError(f"{text!r} is no address such as 127.0.0.1:7443 or [::1]:7443")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ValueError(f"{port!r} is no port between 0 and 65535")
    return host[1:-1] if bracketed else host, int(port)


def is_loopback(address: str) -> bool:
    """Whether nobody but this host reaches HOST:PORT. Of names that is `localhost` alone (RFC 6761 section 6.3)."""
    host = parse_address(address)[0]
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
