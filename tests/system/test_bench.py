"""The benchmark runs: a little of each part, whose figures say nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.requires("root", "command:bwrap"), pytest.mark.timeout(120)]


def test_each_part_of_the_benchmark_gives_figures(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.bench", "--smoke", "--out", str(tmp_path / "bench.json")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=100)
    assert done.stderr == ""
    found = json.loads((tmp_path / "bench.json").read_text())
    assert set(found) == {
        "machine",
        "start_latency",
        "delay",
        "isolation",
        "memory",
        "rates",
        "fanout",
        "log_writing",
        "restart",
        "seconds",
    }
    assert 0 < found["start_latency"]["library, started"]["p50"] < found["start_latency"]["library, ended"]["p50"]
    assert found["memory"]["helpers"] == 2 * found["memory"]["jobs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json"]
