"""The tests that documents name are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`((?:cli|hostile|kernel|library|rootless|service|soak|system)/test_\w+)?(?:::(\w+))?`")


def named(document: Path) -> Iterator[tuple[str, str]]:
    """File and function; one without its file is of the file before."""
    file = ""
    for path, function in NAMED.findall(document.read_text()):
        file = path or file
        if (path or function) and not path.endswith("/test_x"):  # which explains how they are named
            yield file, function


@pytest.mark.parametrize("name", ["peers.md", "trust.md", "threat-model.md", "shim-review.md"])
def test_the_tests_that_a_document_names_are_there(name: str) -> None:
    missing = []
    for file, function in named(ROOT / "docs" / name):
        path = ROOT / "tests" / f"{file}.py"
        if not path.exists() or (function and f"def test_{function}(" not in path.read_text()):
            missing.append(f"{file}::{function}")
    assert missing == []


def test_the_promises_and_complaints_are_all_shown_by_something() -> None:
    for name in ("peers.md", "trust.md"):
        assert len(list(named(ROOT / "docs" / name))) > 20
