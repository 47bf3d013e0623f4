"""Sizes, durations and addresses as people type them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobrunner.units import format_duration, format_size, parse_address, parse_duration, parse_size

ARABIC_ONE = "\u0661"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("12B", 12),
        ("512k", 512_000),
        ("512KB", 512_000),
        ("512Ki", 512 << 10),
        ("64MiB", 64 << 20),
        ("100M", 100_000_000),
        ("1G", 10**9),
        ("1.5GiB", 3 << 29),
        ("0.1k", 100),
        (" 2 TiB ", 2 << 40),
        ("1tb", 10**12),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1e3", "M", "1X", "1 2", "1MM", "1i", "1,5G", "0x10", "nan", "inf", "9" * 65, ARABIC_ONE]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size such as"):
        parse_size(text)


@given(st.integers(0, 1 << 62))
def test_a_formatted_size_is_read_as_nearly_itself(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= size * 0.001


@given(st.integers(1, 1023), st.sampled_from(["KiB", "MiB", "GiB", "TiB"]))
def test_a_whole_size_keeps_its_form(number: int, unit: str) -> None:
    assert format_size(parse_size(f"{number}{unit}")) == f"{number}{unit}"


def test_sizes_are_short() -> None:
    texts = [format_size(size) for size in (0, 999, 1000, 1 << 30, 100_000_000, 1234567890)]
    assert texts == ["0B", "999B", "1KB", "1GiB", "100MB", "1.235GB"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 10.0),
        ("0.5", 0.5),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        ("2m", 120.0),
        ("1h30m", 5400.0),
        ("1d", 86400.0),
        ("1m0.1s", 60.1),
    ],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1x", "s", "1h 30m", "1s1s", "1e3", "nan", "1h30", "9" * 65])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration such as"):
        parse_duration(text)


@given(st.integers(0, 10**12))
def test_a_formatted_duration_is_read_as_itself(millis: int) -> None:
    assert parse_duration(format_duration(millis / 1000)) == millis / 1000


def test_durations_are_short() -> None:
    assert [format_duration(seconds) for seconds in (0, 0.25, 1.5, 5400, 90061)] == ["0ms", "250ms", "1.5s", "1h30m", "1d1h1m1s"]


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:7443", ("127.0.0.1", 7443)), ("[::1]:0", ("::1", 0)), ("host.example:65535", ("host.example", 65535))],
)
def test_an_address_is_read(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "host", ":7443", "::1:7443", "host:", "host:65536", "host:-1", "host:x", "[]:1", f"host:{ARABIC_ONE}"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no (address|port)"):
        parse_address(text)
