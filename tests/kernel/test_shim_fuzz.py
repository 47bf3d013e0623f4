"""The item-list parser under random input, with the sanitizers watching: a clean refusal every time."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

import jobrunner.shim
from jobrunner.shim.launch import PROTECTIONS, VolumeMount, pack_plan, parse_report
from tests.support.shim import ShimJob, run_launcher

pytestmark = pytest.mark.requires("root", "command:cc")

SOURCES = sorted(Path(jobrunner.shim.__file__).parent.glob("*.c"))
KEYS = [
    "dir",
    "cgroup2-shim",
    "cgroup1-job",
    "oom-control",
    "cpu-quota",
    "oom-events",
    "birth-ms",
    "writable",
    "counter",
    "hostname",
    "cwd",
    "merge",
    "stop-signal",
    "output-limit",
    "output-policy",
    "on-write-error",
    "network",
    "grace-ms",
    "uid",
    "gid",
    "user-name",
    "show",
    "root",
    "mask",
    "cgroup-view",
    "volume",
    "work-size",
    "network",
    "seccomp",
    "protect",
    "env",
    "arg",
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The helper with AddressSanitizer and UndefinedBehaviorSanitizer; any finding is fatal."""
    binary = tmp_path_factory.mktemp("sanitized") / "jobrunner-shim"
    compiler = shutil.which("cc")
    assert compiler is not None
    flags = ["-std=gnu11", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    subprocess.run([compiler, *flags, "-o", str(binary), *map(str, SOURCES)], check=True)
    return binary


def random_list(rng: random.Random, good: bytes) -> bytes:
    """A list that is wrong somewhere: changed, cut, doubled, or made up."""
    kind = rng.randrange(5)
    raw = bytearray(good)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        items = [
            b"jobrunner-launch=1",
            *(f"{rng.choice(KEYS)}={rng.randbytes(rng.randrange(30))!r}".encode() for _ in range(rng.randrange(40))),
        ]
        return b"\0".join(items) + b"\0" * rng.randrange(3)
    if kind == 2:
        return bytes(raw[: rng.randrange(len(raw))])
    if kind == 3:
        items = good.split(b"\0")
        rng.shuffle(items)
        return b"\0".join(items)
    for _ in range(rng.randrange(1, 8)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def test_random_lists_are_refused_or_started_and_never_misread(sanitized: Path, tmp_path: Path) -> None:
    rng = random.Random(20250101)
    job = ShimJob(tmp_path / "job")
    # It claims nothing: `ctl` is there already, so that even a list that is still right ends at `claim`.
    (job.directory / "ctl").touch()
    counters = [("counter", "pids_peak 1 - /dev/null"), ("counter", "oom_kills 1 oom_kill /proc/self/status")]
    good = pack_plan(
        job.plan(
            *("true", "x"),
            cgroup_items=[*counters, ("cgroup-view", "memory /sys/fs/cgroup")],
            timeout=1.0,
            open_files=10,
            output_limit=1 << 20,
            uid=1 << 30,
            gid=1 << 30,
            user_name="job",
            show=("/usr", "/etc"),
            mask=("/etc/shadow",),
            volumes=[VolumeMount("/tmp/a b", "/volumes/a", owner=(1, 2)), VolumeMount("/tmp", "/volumes/b", read_only=True)],
            seccomp=bytes(16),
            protect=PROTECTIONS,
        )
    )
    steps = set()
    for number in range(400):
        items = random_list(rng, good)
        done = run_launcher(items, tmp_path, sanitized)
        assert done.stderr == b"", (number, items, done.stderr.decode(errors="replace"))
        assert done.returncode == 1, (number, items)
        assert done.stdout.count(b"\n") == 1
        report = parse_report(done.stdout)
        assert report is not None
        steps.add(report.step)
    assert "args" in steps
    assert steps <= {"args", "claim", "log", "cgroup"}


def test_a_whole_job_is_clean_under_the_sanitizers(sanitized: Path, tmp_path: Path) -> None:
    job = ShimJob(tmp_path / "job")
    status = tmp_path / "numbers"
    status.write_text("a 1\nb=2\n" * 1000)
    items = [("counter", f"pids_peak 3 a {status}"), ("counter", f"read_ops 1 b {status}")]
    plan = job.plan("sh", "-c", "echo out; echo err >&2; sleep 100", cgroup_items=items, segment_bytes=3, timeout=60)
    assert job.launch(pack_plan(plan), sanitized).started
    job.say(b"x" * 700 + b"\nhello\n")
    job.stop(grace=5)
    end = job.wait()
    assert (end.cause.name, end.pids_peak, end.read_ops) == ("STOPPED", 3000, 2000)
    assert job.output() in (b"out\nerr\n", b"err\nout\n", b"out\n", b"")


def test_a_root_of_its_own_that_can_be_written_to_is_clean_under_the_sanitizers(sanitized: Path, tmp_path: Path) -> None:
    for changes in ({"writable": True}, {}):
        job = ShimJob(tmp_path / f"job{len(changes)}")
        plan = job.plan(
            *("sh", "-c", "exec 2>/dev/null; touch /usr/x && echo written; whoami"),
            show=("/usr", "/bin", "/lib", "/lib64", "/etc", "/opt", "/nosuch"),
            mask=("/etc/shadow", "/usr/share"),
            uid=1 << 30,
            gid=1 << 30,
            user_name="job",
            volumes=[VolumeMount(str(tmp_path), "/volumes/a", owner=(1, 2)), VolumeMount(str(tmp_path), "/new/b", read_only=True)],
            tmp_size=64 << 20,
            work_size=1 << 20,
            birth=30,
            protect=PROTECTIONS,
            **changes,
        )
        report = job.launch(pack_plan(plan), sanitized)
        assert report.started, report
        assert job.wait().cause.name == "OWN"
        assert job.output() == (b"written\njob\n" if changes else b"job\n")
