"""`jobrunnerd` where its output, input or settings are not as a program may hope: one line and a code, never a traceback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobrunner.server.main import run

pytestmark = [pytest.mark.requires("root"), pytest.mark.timeout(120)]

JOBRUNNERD = str(Path(sys.executable).parent / "jobrunnerd")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("JOBRUNNER")}
FULL = "jobrunnerd: cannot write to standard output: No space left on device\n"


def shell(line: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What a shell line does whose `$0` is jobrunnerd."""
    command = ["sh", "-c", line, JOBRUNNERD]
    return subprocess.run(command, env={**ENVIRONMENT, **env}, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("words", ["check --json", "--help"])
def test_output_that_cannot_be_written_is_told(words: str) -> None:
    done = shell(f'exec "$0" {words} > /dev/full')
    assert (done.returncode, done.stderr) == (74, FULL)


def test_an_output_that_nobody_reads_ends_it_without_a_word() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run([JOBRUNNERD, "--help"], stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_closed_descriptors_are_no_place_for_what_is_opened() -> None:
    done = shell('exec "$0" check <&- >&-')
    assert (done.returncode, done.stderr) == (74, "jobrunnerd: cannot write to standard output: Bad file descriptor\n")
    done = shell('exec "$0" check --json <&- 2>&-')
    assert (done.returncode, done.stderr) == (0, "")
    assert {finding["level"] for finding in json.loads(done.stdout)} <= {"ok", "limited"}


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii:strict"},
    ],
)
def test_a_strange_locale_is_no_matter(env: dict[str, str]) -> None:
    done = shell('exec "$0" check --state-dir /tmp/état', **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "missing" not in done.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--nonsense", "No such option: --nonsense (see `jobrunnerd --help`)"),
        ("check --nonsense", "No such option: --nonsense (see `jobrunnerd check --help`)"),
        ("nonsense", "No such command 'nonsense' (see `jobrunnerd --help`)"),
        ("check extra", "Got unexpected extra argument(s) (extra) (see `jobrunnerd check --help`)"),
        ("stop-jobs --grace -1", "cannot read the command line: grace: '-1' is no duration such as 10, 250ms, 1.5s, 2m or 1h30m"),
        ("check --state-dir ''", "cannot read the command line: state_dir: is empty"),
        ("check --config ''", "cannot read the command line: config: is empty"),
        ("dev --dir ''", "cannot read the command line: dir: is empty"),
        ("dev --listen host:port", "cannot read the command line: listen: 'port' is no port between 0 and 65535"),
    ],
)
def test_wrong_usage_is_one_line(words: str, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(words)) == 2
    assert capfd.readouterr() == ("", f"jobrunnerd: {line}\n")


@pytest.mark.parametrize(
    ("command", "content"),
    [
        ("check", b"memory = "),
        ("serve", b"\xff\xfe"),
        ("drain", b"[defaults]\nmemory = 'lots'\n"),
        ("stop-jobs", b"a = " + 2000 * b"["),
    ],
)
def test_settings_that_cannot_be_read_are_one_line(
    tmp_path: Path, command: str, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.toml"
    file.write_bytes(content)
    assert run([command, "--config", str(file)]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"jobrunnerd: cannot read configuration {file}: ")


@pytest.mark.parametrize(("command", "code"), [("drain", 3), ("stop-jobs", 0)])
def test_a_state_directory_that_nobody_has_made_is_told_and_not_made(
    tmp_path: Path, command: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--state-dir", str(tmp_path / "away")]) == code
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "away").exists()


@pytest.mark.parametrize(("path", "reason"), [("/no/file", "No such file or directory"), ("/tmp", "Is a directory")])
def test_settings_that_are_no_file_are_one_line(path: str, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--config", path]) == 2
    assert capfd.readouterr() == ("", f"jobrunnerd: cannot read configuration {path}: {reason}\n")


def test_settings_that_one_may_not_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("")
    (tmp_path / "settings.toml").chmod(0)
    done = shell(f'exec setpriv --bounding-set -dac_override,-dac_read_search -- "$0" check --config {tmp_path}/settings.toml')
    assert (done.returncode, done.stderr) == (
        2,
        f"jobrunnerd: cannot read configuration {tmp_path}/settings.toml: Permission denied\n",
    )


def test_an_ordinary_user_is_told_and_sees_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir(mode=0)
    done = shell(f'exec unshare --user --map-user=1000 "$0" check --json --state-dir {tmp_path}/hidden/state')
    assert done.stderr == ""
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 3 * any(finding["level"] == "missing" for finding in found.values())
    assert (found["root"]["level"], "job" in found) == ("limited", True)
    assert all(finding["remedy"] for finding in found.values() if finding["level"] != "ok")


def test_findings_as_json_have_four_texts() -> None:
    found = json.loads(shell('exec "$0" check --json').stdout)
    assert {tuple(finding) for finding in found} == {("level", "name", "what", "remedy")}
    assert {type(value) for finding in found for value in finding.values()} == {str}
    assert {finding["level"] for finding in found} <= {"ok", "limited", "missing"}
    names = [finding["name"] for finding in found]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_log_line_stays_one_whatever_a_peer_says(form: str) -> None:
    code = """
import logging, sys
from jobrunner.server import logs
logs.begin("info", sys.argv[1])
logging.getLogger("x").warning("denied %s", "ev\\u00e9\\n2026-01-01 INFO x: all is well\\x1b[2J\\x85\\u2028")
"""
    done = subprocess.run([sys.executable, "-c", code, form], capture_output=True, timeout=60, check=False)
    told = done.stderr.decode()
    assert (done.returncode, len(told.splitlines())) == (0, 1)
    assert told.endswith("\n") and told[:-1].isprintable()
    assert form == "text" or json.loads(told)["message"].endswith("\u2028")
