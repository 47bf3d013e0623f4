"""Trees that were made to hurt whoever walks them as root: deep, full of links out, unreadable, of strange names."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from jobrunner.linux.tree import remove_tree, reown_tree

pytestmark = pytest.mark.requires("root")

DEPTH = 1500
"""More than Python can recurse, and its path is longer than PATH_MAX."""
JOB = 0x70000001


def make_deep(top: Path) -> None:
    here = os.open(top, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("deep", dir_fd=here)
        os.chown("deep", JOB, JOB, dir_fd=here)
        inner = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def deepest_owner(top: Path) -> int:
    here = os.open(top, os.O_RDONLY)
    for _ in range(DEPTH):
        inner = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    try:
        return os.fstat(here).st_uid
    finally:
        os.close(here)


def test_depth_costs_neither_stack_nor_descriptors(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    make_deep(top)
    before = len(os.listdir("/proc/self/fd"))
    assert deepest_owner(top) == JOB
    reown_tree(top)
    assert deepest_owner(top) == 0
    remove_tree(top)
    assert not top.exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_number_of_files_in_a_directory_costs_no_memory(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / "directory").mkdir()
    for number in range(20_000):
        os.close(os.open(top / f"{number:0200}", os.O_CREAT | os.O_WRONLY))
    tracemalloc.start()
    try:
        reown_tree(top)
        remove_tree(top)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not top.exists()
    assert peak < 3 << 20  # the names alone are 5 MB


def test_the_number_of_directories_in_one_costs_no_memory_and_none_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobrunner.linux.tree.BATCH", 100)
    top = tmp_path / "top"
    wide = (top, top / "0" / "wide")
    for directory in wide:
        directory.mkdir(parents=True)
        for number in range(3000):
            (directory / f"{number:0200}").mkdir()
            os.chown(directory / f"{number:0200}", JOB, JOB)
    tracemalloc.start()
    try:
        reown_tree(top)
        _, reowned = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert {path.stat().st_uid for directory in wide for path in directory.iterdir()} == {0}
        tracemalloc.start()
        remove_tree(top)
        _, removed = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not top.exists()
    assert max(reowned, removed) < 400_000  # the names of one alone are 750,000


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Neither by ownership nor by removal; a hard link is the file itself, wherever its other names are."""
    outside, top = tmp_path / "outside", tmp_path / "top"
    outside.mkdir()
    top.mkdir()
    (outside / "file").write_text("kept")
    os.chown(outside / "file", JOB, JOB)
    (top / "to-directory").symlink_to(outside)
    (top / "to-file").symlink_to(outside / "file")
    (top / "to-nothing").symlink_to("/no/such")
    reown_tree(top)
    assert (outside / "file").stat().st_uid == JOB
    assert (top / "to-file").lstat().st_uid == 0
    remove_tree(top)
    assert (outside / "file").read_text() == "kept"


def test_a_link_in_the_place_of_the_tree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "top").symlink_to(tmp_path / "outside")
    with pytest.raises(NotADirectoryError):
        reown_tree(tmp_path / "top")
    with pytest.raises(NotADirectoryError):
        remove_tree(tmp_path / "top")


def test_everything_a_directory_can_hold_is_taken_over_and_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "closed" / "inner").mkdir(parents=True)
    os.mkfifo(top / "fifo")
    (top / "program").write_text("#!/bin/sh\n")
    (top / "program").chmod(0o6777)
    for name in (b"new\nline", b"\xff\xfe", b"-rf", b"x" * 255):
        os.close(os.open(os.fsencode(top) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    (top / "closed").chmod(0)
    for path in (top, *top.rglob("*")):
        os.chown(path, JOB, JOB, follow_symlinks=False)
    (top / "program").chmod(0o6777)
    reown_tree(top)
    assert {path.lstat().st_uid for path in (top, *top.rglob("*"))} == {0}
    assert (top / "program").stat().st_mode & 0o6000 == 0
    assert [path for path in (top, *top.rglob("*")) if path.is_dir() and path.lstat().st_mode & 0o077] == []
    remove_tree(top)
    assert not top.exists()


def test_what_is_not_there_is_removed_already(tmp_path: Path) -> None:
    remove_tree(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        reown_tree(tmp_path / "none")
