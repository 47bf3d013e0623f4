"""What has been written durably is on the disk in this order, as the kernel is asked for it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.requires("command:strace")

WATCHED = "openat,write,fsync,rename,ftruncate"


def asked(tmp_path: Path, code: str) -> list[str]:
    """Calls that have to do with `tmp_path`, each as NAME and the name of its file, or `.` for the directory itself."""
    trace = tmp_path.with_suffix(".trace")
    program = "from pathlib import Path\nfrom jobrunner.durable import append_durably, write_durably\n"
    program += f"path = Path({str(tmp_path / 'file')!r})\n"
    # strace(1): -y prints a descriptor's path.
    subprocess.run(["strace", "-y", "-e", f"trace={WATCHED}", "-o", trace, sys.executable, "-c", program + code], check=True)
    calls = []
    for line in trace.read_text().splitlines():
        found = re.match(rf'(fsync|write|rename)\(.*?[<"]{re.escape(str(tmp_path))}(?:/([^>"]*))?[>"]', line)
        if found:
            calls.append(f"{found[1]} {found[2] or '.'}")
    return calls


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_that_is_told(tmp_path: Path) -> None:
    assert asked(tmp_path, "write_durably(path, b'data')") == ["write .file.new", "fsync .file.new", "rename .file.new", "fsync ."]


def test_lines_are_on_the_disk_and_the_name_of_a_new_file_too(tmp_path: Path) -> None:
    first, later = ["write file", "fsync file", "fsync ."], ["write file", "fsync file"]
    assert asked(tmp_path, "append_durably(path, [b'one\\n'])\nappend_durably(path, [b'two\\n'])") == first + later
