"""`jobrunner log` with its options, and when the connection is lost."""

from __future__ import annotations

import calendar
import hashlib
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from jobrunner import Stream
from jobrunner.output import MAX_LINE, Chunk
from jobrunner_cli.stamp import Stamper
from tests.support.cli import jobrunner, popen, shell, stop, wait
from tests.support.daemon import ServerProcess
from tests.support.shim import wait_until
from tests.support.timing import at_most

pytestmark = pytest.mark.requires("root")

STAMP = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z "
OUT, ERR = Stream.STDOUT, Stream.STDERR


def ended(server: ServerProcess, script: str) -> str:
    job_id = shell(server, script)
    wait(server, job_id)
    return job_id


def test_the_last_lines(server: ServerProcess) -> None:
    job_id = ended(server, "seq 1000; printf end")
    assert jobrunner(server, "log", "--tail", "3", job_id).out == b"999\n1000\nend"
    assert jobrunner(server, "log", "--tail", "0", job_id).out == b""
    assert jobrunner(server, "log", "--tail", "1", "--stream", "stderr", job_id).out == b""


def test_from_a_time_and_until_a_time(server: ServerProcess) -> None:
    job_id = ended(server, "echo old; sleep 0.1; echo new")
    moment = jobrunner(server, "log", "-t", job_id).text.splitlines()[1].split()[0]
    assert jobrunner(server, "log", "--since", moment, job_id).out == b"new\n"
    assert jobrunner(server, "log", "--until", moment, job_id).out == b"old\n"
    assert jobrunner(server, "log", "--since", "1h", "--until", "59m", job_id).out == b""
    assert jobrunner(server, "log", "--since", "1h", job_id).out == b"old\nnew\n"
    assert jobrunner(server, "log", "--since", "2001-01-01T00:00:00Z", "--until", "2001-01-02", job_id).out == b""


def test_a_follower_ends_at_the_time_given(server: ServerProcess) -> None:
    job_id = shell(server, "echo one; sleep 1000")
    moment = time.time() + 2
    local = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(moment))
    assert jobrunner(server, "log", "-f", "--until", local, job_id, timeout=15).out == b"one\n"
    assert jobrunner(server, "status", job_id).text == "running\n"
    stop(server, job_id)


def test_timestamps_are_of_each_line_and_are_those_of_the_writes(server: ServerProcess) -> None:
    before = time.time()
    job_id = ended(server, "echo one; sleep 0.3; printf 'two\\r\\n\\303\\244\\nlast'")
    result = jobrunner(server, "log", "-t", job_id)
    assert re.fullmatch(STAMP + rb"one\n" + STAMP + b"two\r\n" + STAMP + "ä\n".encode() + STAMP + b"last", result.out)
    times = [line[:27].decode() for line in result.out.split(b"\n")]
    seconds = [calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")) + float(text[19:26]) for text in times]
    assert before <= seconds[0] <= time.time()
    assert 0.29 <= seconds[1] - seconds[0] < at_most(10)
    assert seconds[1:] == [seconds[1]] * 3


def test_the_beginning_of_a_line_is_shown_before_its_end_is_there(server: ServerProcess) -> None:
    job_id = shell(server, "printf 'go on? '; while [ ! -e /tmp/never ]; do sleep 1; done")
    with popen(server, "log", "-f", "-t", job_id) as process:
        assert process.stdout is not None
        assert re.fullmatch(STAMP + rb"go on\? ", process.stdout.read(35))
        process.kill()
    stop(server, job_id)


@pytest.mark.parametrize(
    "words",
    [("--tail", "-1"), ("--tail", "x"), ("--since", "yesterday"), ("--until", "later"), ("--since", "1m", "--until", "2m")],
    ids=" ".join,
)
def test_a_bad_value_names_its_option(server: ServerProcess, words: tuple[str, ...]) -> None:
    result = jobrunner(server, "log", *words, "0123456789ab")
    assert result.code == 65
    assert re.fullmatch(rf"jobrunner: cannot read log: {words[-2][2:]}: .+\n", result.err)


def test_tail_with_an_offset_is_refused(server: ServerProcess) -> None:
    result = jobrunner(server, "log", "--tail", "1", "--offset", "1", "0123456789ab")
    assert (result.code, result.err) == (65, "jobrunner: cannot read log: tail: cannot be combined with an offset\n")


def stamped(*chunks: tuple[Stream, bytes], gap_before: int | None = None) -> bytes:
    """Everything that a stamper gives, with each stamp as `@`."""
    stamper, offset, pieces = Stamper(), 0, []
    for number, (stream, data) in enumerate(chunks):
        if number == gap_before:
            pieces += stamper.finish()
        pieces += stamper.feed(Chunk(stream, data, offset, 1.5))
        offset += len(data)
    pieces += stamper.finish()
    return b"".join(data for _, data in pieces).replace(b"1970-01-01T00:00:01.500000Z ", b"@")


def test_a_stamp_stands_at_the_beginning_of_a_line_only() -> None:
    assert stamped((OUT, b"a\r"), (OUT, b"\nb"), (ERR, b"x\n"), (OUT, b"c\n\xc3"), (OUT, b"\xa4")) == b"@a\r\n@x\n@bc\n@\xc3\xa4"


def test_a_line_without_end_has_one_stamp() -> None:
    assert stamped(*((OUT, b"x" * 65472),) * 40, (OUT, b"\ny\n")) == b"@" + b"x" * 65472 * 40 + b"\n@y\n"
    assert 2 * MAX_LINE < 65472 * 40


def test_a_line_that_a_gap_has_cut_is_ended_before_the_next_stamp() -> None:
    assert stamped((OUT, b"cut"), (OUT, b"off\n"), gap_before=1) == b"@cut\n@off\n"


def wait_until_connected(server: ServerProcess) -> None:
    """Until a client's connection is there: `wait` says nothing by which one could know."""
    port = f":{int(server.address.rpartition(':')[2]):04X}"
    established = "01"
    while not any(
        line.split()[1].endswith(port) and line.split()[3] == established
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
    ):
        time.sleep(0.01)
    time.sleep(0.5)  # its handshake


@pytest.mark.parametrize(("verb", "rpc"), [("log", "SubscribeOutput"), ("run", "SubscribeOutput"), ("wait", "Wait")])
def test_a_server_that_restarts_is_one_line_when_it_goes_and_one_when_it_is_back(tmp_path: Path, verb: str, rpc: str) -> None:
    lines = b"".join(b"%d\n" % number for number in range(1, 401))
    count = "while [ $i -lt {} ]; do i=$((i+1)); echo $i; sleep 0.01; done"
    script = f"i=0; {count.format(100)}; while [ ! -e /work/go ]; do sleep 0.02; done; {count.format(400)}; exit 5"
    audit, settings = tmp_path / "audit", tmp_path / "jobrunnerd.toml"
    settings.write_text(f'audit_log = "{audit}"\n')
    first = ServerProcess(tmp_path, f"--config={settings}")
    words = ("run", "sh", "-c", script) if verb == "run" else (verb, *["-f"][: verb == "log"], shell(first, script))
    with popen(first, *words) as process:
        wait_until(lambda: f'JobService/{rpc}"' in audit.read_text(), at_most(20))
        first.end()
        second = ServerProcess(tmp_path, f"--config={settings}", listen=first.address)
        (job,) = (tmp_path / "state" / "jobs").iterdir()
        (job / "work" / "go").touch()
        out, err = process.communicate(timeout=at_most(40))
    second.end()
    assert process.returncode == (0 if verb == "log" else 5)
    assert out == (b"failed: exit code 5\n" if verb == "wait" else lines)
    told = err.decode().splitlines()
    assert len(told) == 2, told
    assert told[0].startswith("jobrunner: cannot ") or told[0].startswith("jobrunner: lost ")
    assert told[0].endswith("; trying again")
    assert told[1] == "jobrunner: connected again"


def test_ctrl_c_works_at_once_while_the_server_is_away(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)
    with popen(server, "log", "-f", shell(server, "echo here; sleep 30")) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"here\n"
        server.end()
        assert process.stderr.readline().endswith(b"trying again\n")
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert time.monotonic() - begun < at_most(5)  # it tries again for 60 s


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "not-yet"])
def test_ctrl_c_works_at_once_while_the_server_is_frozen(private_server: ServerProcess, connected: bool) -> None:
    job_id = shell(private_server, "echo here; sleep 30")
    if not connected:
        private_server.process.send_signal(signal.SIGSTOP)
    try:
        with popen(private_server, "log", "-f", job_id) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            if connected:
                assert process.stdout.readline() == b"here\n"
                private_server.process.send_signal(signal.SIGSTOP)
            else:
                wait_until_connected(private_server)
            process.send_signal(signal.SIGINT)
            assert process.wait(at_most(5)) == 130, "it waits for the server"
            assert process.stderr.read() == b""
    finally:
        private_server.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("words", [("-f",), (), ("-t",)], ids=["follow", "snapshot", "stamps"])
def test_a_reader_that_takes_one_line_and_goes_ends_it_without_a_word(server: ServerProcess, words: tuple[str, ...]) -> None:
    """`jobrunner log ID | head -1`."""
    job_id = ended(server, "yes | head -c 8000000")
    with popen(server, "log", *words, job_id) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith(b"y\n")
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (141, b"")


def test_a_job_that_is_removed_while_its_log_is_read_is_told(server: ServerProcess) -> None:
    size = 48 << 20
    job_id = ended(server, f"head -c {size} /dev/zero")
    segments = sorted(path.stem for path in (server.state / "jobs" / job_id / "log").glob("*.idx"))
    with popen(server, "log", "-f", job_id) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        got = len(process.stdout.read(1000))
        assert jobrunner(server, "rm", job_id).code == 0
        while data := process.stdout.read(1 << 20):
            assert not data.strip(b"\0")
            got += len(data)
            time.sleep(0.02)  # slower than the network: when the error is there, much of the output has still to be written
        assert process.wait(20) == 66
        assert process.stderr.read().decode() == f'jobrunner: cannot find job "{job_id}": no such job\n'
    assert got == int(segments[1], 16), "the segment that was being read is given to its end"


def test_a_reader_that_pauses_for_longer_than_the_server_waits_gets_every_byte(tmp_path: Path) -> None:
    (tmp_path / "jobrunnerd.toml").write_text("send_timeout = 0.5\n")
    server = ServerProcess(tmp_path, f"--config={tmp_path}/jobrunnerd.toml")
    job_id = ended(server, "head -c 24000000 /dev/urandom | tee /dev/stderr | sha256sum >&2")
    with popen(server, "log", "-f", "--stream", "stderr", job_id, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        begin = process.stderr.read(1000)
        time.sleep(3)  # as `less` does
        data = begin + process.stderr.read()
        assert process.wait(20) == 0
    server.end()
    assert hashlib.sha256(data[:24_000_000]).hexdigest() == data[24_000_000:].split()[0].decode()
    assert len(data) == 24_000_000 + 64 + 4
