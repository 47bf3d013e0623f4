"""Each command of the CLI against a real server."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from jobrunner_cli.main import run
from tests.support.cli import jobrunner, shell, start, stop, wait

if TYPE_CHECKING:
    from tests.support.daemon import ServerProcess

pytestmark = pytest.mark.requires("root")


def ended(server: ServerProcess, script: str, *options: str) -> str:
    """The id of a shell script's job that has ended."""
    job_id = shell(server, script, *options)
    wait(server, job_id)
    return job_id


COMMANDS = ("start", "run", "stop", "status", "log", "wait", "info", "explain", "ls", "rm", "certs", "workspace")


def test_without_a_command_it_tells_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("Usage: jobrunner [OPTIONS] COMMAND")
    listed = [line for line in shown.err.partition("Commands:\n")[2].splitlines() if line[:3] != "   "]
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert not [line for line in listed if line.endswith("...")], "the first sentence has room in the list"


@pytest.mark.parametrize("command", [*COMMANDS, "certs issue", "workspace rm"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_in_words_of_the_field(capsys: pytest.CaptureFixture[str], command: str, option: str) -> None:
    assert run([*command.split(), option]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: jobrunner {command} [OPTIONS]")
    assert not re.search(r"<\w+|[{}]", shown), "types of Python's"


def test_start_prints_the_job_id_of_12_hexadecimal_characters(server: ServerProcess) -> None:
    result = jobrunner(server, "start", "echo", "Hello World")
    assert result.code == 0
    assert result.err == ""
    assert result.out.startswith(b"Started job with ID: ")
    assert len(result.out) == len(b"Started job with ID: ") + 12 + 1


@pytest.mark.parametrize("words", [("echo", "--help"), ("--", "echo", "--help"), ("echo", "-n", "x", "--name", "y")])
def test_options_end_at_the_first_word_of_the_command(server: ServerProcess, words: tuple[str, ...]) -> None:
    job_id = start(server, *words)
    command = [word for word in words if word != "--"]
    described = json.loads(jobrunner(server, "info", "--json", job_id).out)
    assert [described["command"], *described["args"]] == command
    assert described["name"] == ""


def test_a_double_dash_after_the_command_belongs_to_the_command(server: ServerProcess) -> None:
    job_id = start(server, "echo", "--", "x")
    assert json.loads(jobrunner(server, "info", "--json", job_id).out)["args"] == ["--", "x"]


@pytest.mark.parametrize(("script", "word"), [("exit 0", "completed"), ("exit 3", "failed"), ("kill -SEGV $$", "failed")])
def test_status_is_one_word(server: ServerProcess, script: str, word: str) -> None:
    result = jobrunner(server, "status", ended(server, script))
    assert (result.code, result.text, result.err) == (0, f"{word}\n", "")


def test_status_of_a_running_and_a_stopped_job(server: ServerProcess) -> None:
    job_id = start(server, "sleep", "1000")
    assert jobrunner(server, "status", job_id).text == "running\n"
    assert jobrunner(server, "stop", job_id).code == 0
    assert jobrunner(server, "status", job_id).text == "terminated\n"


def test_stop_prints_nothing(server: ServerProcess) -> None:
    result = jobrunner(server, "stop", start(server, "sleep", "1000"))
    assert (result.code, result.out, result.err) == (0, b"", "")


def test_stop_of_an_ended_job_says_so_in_one_line_and_succeeds(server: ServerProcess) -> None:
    result = jobrunner(server, "stop", ended(server, "exit 0"))
    assert (result.code, result.out) == (0, b"")
    assert result.err == "jobrunner: job had already ended: completed, exit code 0\n"


def test_stop_with_a_short_grace_kills_a_job_that_ignores_the_signal(server: ServerProcess) -> None:
    job_id = shell(server, "trap '' TERM; echo ready; sleep 1000")
    assert jobrunner(server, "stop", "--grace", "100ms", job_id).code == 0
    assert json.loads(jobrunner(server, "info", "--json", job_id).out)["signal"] == 9


def test_log_gives_stdout_to_stdout_and_stderr_to_stderr(server: ServerProcess) -> None:
    result = jobrunner(server, "log", ended(server, "echo out; echo err >&2"))
    assert (result.code, result.out, result.err) == (0, b"out\n", "err\n")


@pytest.mark.parametrize(("stream", "out", "err"), [("stdout", b"out\n", ""), ("stderr", b"", "err\n")])
def test_log_of_one_stream(server: ServerProcess, stream: str, out: bytes, err: str) -> None:
    result = jobrunner(server, "log", "--stream", stream, ended(server, "echo out; echo err >&2"))
    assert (result.code, result.out, result.err) == (0, out, err)


def test_log_from_an_offset(server: ServerProcess) -> None:
    assert jobrunner(server, "log", "--offset", "4", ended(server, "printf 0123456789")).out == b"456789"


def test_log_keeps_a_last_line_without_newline_and_bytes_that_are_no_text(server: ServerProcess) -> None:
    job_id = ended(server, r"printf '\000\377\200\r\n\033[1mx'")
    assert jobrunner(server, "log", job_id).out == b"\x00\xff\x80\r\n\x1b[1mx"


def test_log_of_a_running_job_is_a_snapshot(server: ServerProcess) -> None:
    job_id = shell(server, "echo first; sleep 1000")
    with_first = jobrunner(server, "log", job_id)
    assert with_first.code == 0
    assert with_first.out in (b"", b"first\n")
    assert jobrunner(server, "status", job_id).text == "running\n"
    stop(server, job_id)


def test_follow_ends_when_the_job_ends(server: ServerProcess) -> None:
    job_id = shell(server, "echo begin; sleep 1; echo end")
    result = jobrunner(server, "log", "-f", job_id)
    assert (result.code, result.out, result.err) == (0, b"begin\nend\n", "")


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        ("exit 0", 0, "completed: exit code 0\n"),
        ("exit 200", 200, "failed: exit code 200\n"),
        ("kill -SEGV $$", 139, "failed: killed by SIGSEGV\n"),
    ],
)
def test_wait_prints_how_the_job_ended_and_exits_with_its_code(server: ServerProcess, script: str, code: int, line: str) -> None:
    result = jobrunner(server, "wait", shell(server, script))
    assert (result.code, result.text, result.err) == (code, line, "")


def test_wait_for_a_stopped_job_says_who_stopped_it(server: ServerProcess) -> None:
    job_id = start(server, "sleep", "1000")
    jobrunner(server, "stop", job_id)
    result = jobrunner(server, "wait", job_id)
    assert (result.code, result.text) == (143, "terminated: stopped by admin (killed by SIGTERM)\n")


def test_info_as_json_has_what_was_asked_for(server: ServerProcess) -> None:
    options = ("-n", "build-7", "--memory", "64MiB", "--cpus", "0.5", "--pids", "20", "--label", "team=core", "--timeout", "1m")
    described = json.loads(jobrunner(server, "info", "--json", ended(server, "true", *options)).out)
    limits = described["limits"]
    assert (limits["memory"], limits["cpus"], limits["pids"], limits["timeout"]) == (64 << 20, 0.5, 20, 60.0)
    assert (described["name"], described["labels"], described["user"]) == ("build-7", {"team": "core"}, "admin")
    assert (described["status"], described["end_reason"], described["exit_code"]) == ("completed", "exited", 0)


def test_info_for_people_names_status_command_and_user(server: ServerProcess) -> None:
    text = jobrunner(server, "info", start(server, "echo", "a b")).text
    lines = dict(line.split(":", 1) for line in text.splitlines())
    assert lines["command"].strip() == "echo 'a b'"
    assert lines["user"].strip() == "admin"


def test_the_environment_and_the_directory_reach_the_job(server: ServerProcess) -> None:
    job_id = ended(server, 'echo "$A-$B"; pwd', "--env", "A=1", "-e", "B=x=y", "--cwd", "/usr")
    assert jobrunner(server, "log", job_id).out == b"1-x=y\n/usr\n"


def test_merge_makes_one_stream_of_both_in_exact_order(server: ServerProcess) -> None:
    job_id = ended(server, "for i in 1 2 3; do echo o$i; echo e$i >&2; done", "--merge")
    assert jobrunner(server, "log", job_id).out == b"o1\ne1\no2\ne2\no3\ne3\n"


def test_the_same_request_id_gives_the_same_job(server: ServerProcess) -> None:
    first = start(server, "--request-id", "once-only", "echo", "hi")
    assert start(server, "--request-id", "once-only", "echo", "hi") == first


def test_a_stop_signal_of_ones_own_is_sent(server: ServerProcess) -> None:
    job_id = shell(server, "trap 'exit 5' USR1; echo ready; while :; do sleep 0.05; done", "--stop-signal", "USR1")
    jobrunner(server, "stop", job_id)
    assert json.loads(jobrunner(server, "info", "--json", job_id).out)["end_reason"] == "stopped"


def test_a_timeout_ends_the_job_and_wait_says_deadline(server: ServerProcess) -> None:
    result = jobrunner(server, "wait", start(server, "--timeout", "300ms", "sleep", "1000"))
    assert result.code == 143
    assert result.text.startswith("terminated: ended at its deadline of 0.3 s")


def test_ls_lists_newest_first(server: ServerProcess) -> None:
    older, newer = start(server, "-n", "pair", "true"), start(server, "-n", "pair", "true")
    assert jobrunner(server, "ls", "-q", "-n", "pair").text.split()[:2] == [newer, older]


def test_ls_is_a_table_with_name_status_and_command(server: ServerProcess) -> None:
    job_id = ended(server, "exit 0", "-n", "hello_world")
    heading, *rows = jobrunner(server, "ls").text.splitlines()
    assert heading.split() == ["ID", "STATUS", "NAME", "STARTED", "USER", "COMMAND"]
    row = next(row for row in rows if row.startswith(job_id))
    assert row.split()[1:3] == ["completed", "hello_world"]


def test_ls_by_status_and_label(server: ServerProcess) -> None:
    job_id = ended(server, "exit 1", "--label", "case=by-status")
    ended(server, "exit 0", "--label", "case=by-status")
    assert jobrunner(server, "ls", "-q", "--status", "failed", "--label", "case=by-status").text == f"{job_id}\n"


def test_ls_as_json_holds_what_info_holds(server: ServerProcess) -> None:
    job_id = ended(server, "exit 4")
    listed = {job["job_id"]: job for job in json.loads(jobrunner(server, "ls", "--json").out)}
    assert listed[job_id] == json.loads(jobrunner(server, "info", "--json", job_id).out)


def test_control_characters_of_a_command_do_not_reach_the_terminal(server: ServerProcess) -> None:
    start(server, "echo", "\033[2Jx\ny")
    assert b"\033" not in jobrunner(server, "ls").out


def test_rm_removes_an_ended_job(server: ServerProcess) -> None:
    job_id = ended(server, "true")
    assert jobrunner(server, "rm", job_id).code == 0
    assert jobrunner(server, "status", job_id).code == 66


def test_a_viewer_sees_status_and_output(server: ServerProcess) -> None:
    job_id = ended(server, "echo seen")
    assert jobrunner(server, "status", job_id, user="viewer").text == "completed\n"
    assert jobrunner(server, "log", job_id, user="viewer").out == b"seen\n"
