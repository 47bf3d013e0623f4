"""The root, the identity and the rights of a command, each from an item of its own; without the item the same is not so."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobrunner.shim.launch import PROTECTIONS, VolumeMount
from tests.support.shim import ShimJob, shim_job

pytestmark = pytest.mark.requires("root")

SHOW = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt")
UID = 0x70000007
DENY_UNAME = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 63, 0x06, 0, 0, 0x00050001, 0x06, 0, 0, 0x7FFF0000)
"""uname(2) of x86-64 is EPERM, everything else is allowed."""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ShimJob]:
    with shim_job(tmp_path) as job:
        yield job


def inside(job: ShimJob, script: str, **changes: Any) -> str:
    """What a script says in a root of its own, as a user of its own, without rights."""
    own = {"show": SHOW, "uid": UID, "gid": UID, "user_name": "job", "tmp_size": 1 << 20, "protect": PROTECTIONS}
    plan: dict[str, Any] = own | changes
    job.run(script, **plan)
    return job.output().decode()


def test_the_root_holds_what_is_shown_and_what_is_the_jobs_own(job: ShimJob) -> None:
    shown = {path[1:] for path in SHOW if os.path.lexists(path)}
    assert set(inside(job, "ls -A /").split()) == shown | {"proc", "sys", "dev", "tmp", "work"}


def test_nothing_shown_can_be_written_to_by_root_either(job: ShimJob) -> None:
    script = "for d in / /usr /etc /dev /sys; do touch $d/x 2>/dev/null && echo $d; done; touch /tmp/x /dev/shm/x && echo tmp"
    assert inside(job, script, uid=None, gid=None, user_name="", protect=()) == "tmp\n"


def test_the_hosts_mounts_are_gone(job: ShimJob) -> None:
    points = [line.split()[4] for line in inside(job, "cat /proc/self/mountinfo").splitlines()]
    assert points[0] == "/"
    assert len(points) == len(set(points))
    assert {point.split("/")[1] for point in points} <= {"", "usr", "etc", "opt", "proc", "sys", "dev", "tmp", "work", "lib64"}


def test_a_user_of_its_own_with_a_name_and_no_rights(job: ShimJob) -> None:
    said = inside(job, "id -u; id -g; id -G; whoami; grep -E '^(Cap|NoNewPrivs)' /proc/self/status").split("\n")
    assert said[:4] == [str(UID), str(UID), str(UID), "job"]
    rights = dict(line.split(":\t") for line in said[4:] if line)
    assert rights.pop("NoNewPrivs") == "1"
    assert set(rights.values()) == {"0" * 16}


def test_its_output_is_its_own(job: ShimJob) -> None:
    assert inside(job, "echo a > /dev/stdout; echo b | tee /dev/stderr").split() == ["a", "b", "b"]


def test_devices_terminals_and_queues(job: ShimJob) -> None:
    script = (
        "head -c4 /dev/zero | wc -c; head -c4 /dev/urandom | wc -c; echo x > /dev/null; ls /dev; "
        "python3 -c 'import os, pty; m, s = pty.openpty(); print(os.ttyname(s))'"
    )
    said = inside(job, script).split()
    assert said[:2] == ["4", "4"]
    assert said[-1] == "/dev/pts/0"
    names = ["fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"]
    assert sorted(said[2:-1]) == names


def test_tmp_has_its_size(job: ShimJob) -> None:
    script = "head -c 2000000 /dev/zero > /tmp/x; stat -c %s /tmp/x; head -c 2000000 /dev/zero > /dev/shm/x; stat -c %s /dev/shm/x"
    assert [int(word) for word in inside(job, f"exec 2>/dev/null; {script}").split() if word.isdigit()] == [1 << 20, 1 << 20]


def test_a_mask_hides_a_file_and_a_directory(job: ShimJob, tmp_path: Path) -> None:
    secret = tmp_path / "shown"
    (secret / "directory").mkdir(parents=True)
    (secret / "directory" / "key").write_text("key")
    (secret / "file").write_text("secret")
    secret.chmod(0o755)
    script = f"cat {secret}/file; ls {secret}/directory"
    masks = (f"{secret}/file", f"{secret}/directory", f"{secret}/nosuch")
    assert inside(job, script, show=(*SHOW, str(secret)), mask=masks) == ""
    with shim_job(tmp_path) as open_to_all:
        assert inside(open_to_all, script, show=(*SHOW, str(secret))) == "secretkey\n"


def test_proc_is_guarded(job: ShimJob, tmp_path: Path) -> None:
    script = "wc -c < /proc/timer_list; (echo 1 > /proc/sys/vm/overcommit_ratio) 2>&1 | grep -o 'Read-only.*'"
    root = {"uid": None, "gid": None, "user_name": ""}
    assert inside(job, script, protect=("proc",), **root) == "0\nRead-only file system\n"
    with shim_job(tmp_path) as bare:
        assert int(inside(bare, "wc -c < /proc/timer_list", protect=(), **root)) > 0


def test_pid_1_cannot_be_looked_into(job: ShimJob) -> None:
    links = "for f in exe fd/0 root cwd; do readlink /proc/1/$f && echo $f; done"
    assert inside(job, f"exec 2>/dev/null; {links}; cat /proc/1/environ; ls /proc/1/fd; kill -9 1; echo no") == "no\n"


def test_work_is_the_directory_of_the_host(job: ShimJob, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    os.chown(work, UID, UID)
    assert inside(job, "pwd; echo kept > file; cat file", work=str(work), cwd="/work") == "/work\nkept\n"
    assert (work / "file").read_text() == "kept\n"
    assert (work / "file").stat().st_uid == UID


def test_work_can_be_a_tmpfs(job: ShimJob) -> None:
    script = "head -c 2000000 /dev/zero > x; stat -c '%s %u' x"
    assert inside(job, f"exec 2>/dev/null; {script}", work_size=1 << 20, cwd="/work") == f"{1 << 20} {UID}\n"


def test_volumes_are_read_only_or_not(job: ShimJob, tmp_path: Path) -> None:
    directory = tmp_path / "a volume"
    directory.mkdir()
    directory.chmod(0o777)
    volumes = [VolumeMount(str(directory), "/volumes/w"), VolumeMount(str(directory), "/volumes/r", read_only=True)]
    script = "echo x > /volumes/w/file; cat /volumes/r/file; (echo y > /volumes/r/file) 2>&1 | grep -o Read-only"
    assert inside(job, script, volumes=volumes) == "x\nRead-only\n"
    assert (directory / "file").read_text() == "x\n"


OWNER = 0x70001234
"""Who owns the files of a volume on disk."""


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """A volume whose files are OWNER's and nobody else's, but for one of root's."""
    volume = tmp_path / "volume"
    volume.mkdir(mode=0o700)
    (volume / "file").write_text("theirs\n")
    (volume / "roots").write_text("secret\n")
    for path in (volume / "file", volume / "roots"):
        path.chmod(0o600)
    for path in (volume, volume / "file"):
        os.chown(path, OWNER, OWNER)
    return volume


def test_a_volume_of_another_owner_is_the_jobs_own(job: ShimJob, owned: Path) -> None:
    volumes = [VolumeMount(str(owned), "/volumes/v", owner=(OWNER, OWNER))]
    script = (
        "cd /volumes/v; cat file; stat -c '%u:%g' . file; echo x > new; ln new linked; mv linked moved; mkdir -p a/b && echo made"
    )
    own = f"{UID}:{UID}"
    assert inside(job, script, volumes=volumes).split() == ["theirs", own, own, "made"]
    made = [owned / name for name in ("new", "moved", "a", "a/b")]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(OWNER, OWNER)}


def test_files_of_a_third_owner_stay_out_of_reach(job: ShimJob, owned: Path) -> None:
    volumes = [VolumeMount(str(owned), "/volumes/v", owner=(OWNER, OWNER))]
    script = "cd /volumes/v; stat -c %u roots; cat roots; chmod 666 roots; chown 0 file; echo x >> roots"
    assert inside(job, f"exec 2>/dev/null; {script}", volumes=volumes) == "65534\n"
    assert (owned / "roots").read_text() == "secret\n"


def test_a_volume_of_another_owner_without_the_mapping_is_a_strangers(job: ShimJob, owned: Path) -> None:
    assert inside(job, "cat /volumes/v/file 2>/dev/null", volumes=[VolumeMount(str(owned), "/volumes/v")]) == ""


def test_a_mapped_volume_can_be_read_only(job: ShimJob, owned: Path) -> None:
    volumes = [VolumeMount(str(owned), "/volumes/v", read_only=True, owner=(OWNER, OWNER))]
    assert inside(job, "exec 2>/dev/null; cd /volumes/v; cat file; echo x > file || echo no", volumes=volumes) == "theirs\nno\n"


def test_a_setuid_program_of_a_volume_gives_nothing(job: ShimJob, owned: Path) -> None:
    volumes = [VolumeMount(str(owned), "/volumes/v", owner=(OWNER, OWNER))]
    script = "cp /usr/bin/id /volumes/v/id && chmod 6755 /volumes/v/id && /volumes/v/id -u"
    assert inside(job, script, volumes=volumes, protect=("capabilities",)) == f"{UID}\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of a system call is an architecture's")
def test_a_filter_of_system_calls(job: ShimJob, tmp_path: Path) -> None:
    assert "Operation not permitted" in inside(job, "uname 2>&1", seccomp=DENY_UNAME)
    with shim_job(tmp_path) as bare:
        assert inside(bare, "uname 2>&1") == "Linux\n"


def test_the_hosts_network(job: ShimJob) -> None:
    job.run("readlink /proc/self/ns/net", network_host=True)
    assert job.output().decode().strip() == os.readlink("/proc/self/ns/net")


def test_a_root_of_its_own_by_directory(job: ShimJob, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "usr").mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc").mkdir()
    (root / "etc" / "here").write_text("named\n")
    volume = [VolumeMount("/usr", "/usr", read_only=True)]
    assert inside(job, "cat /etc/here; ls /etc", show=(), root=str(root), volumes=volume) == "named\nhere\n"


@pytest.mark.parametrize("leads", ["/store/{}", "../store/{}"])
def test_names_are_put_where_links_of_a_named_root_lead(job: ShimJob, tmp_path: Path, leads: str) -> None:
    """As in NixOS, whose /etc is made of them."""
    root = tmp_path / "root"
    for name in ("usr", "etc", "store"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    for name, line in {"passwd": "root:x:0:0::/:/bin/sh\n", "group": "root:x:0:\n"}.items():
        (root / "store" / name).write_text(line)
        (root / "etc" / name).symlink_to(leads.format(name))
    volume = [VolumeMount("/usr", "/usr", read_only=True)]
    told = inside(job, "id -un; id -gn; tail -qn 1 /etc/passwd /etc/group", show=(), root=str(root), volumes=volume)
    assert told == "job\njob\nroot:x:0:0::/:/bin/sh\nroot:x:0:\n"
    assert (root / "store/group").read_text() == "root:x:0:\n"


def test_no_link_of_a_named_root_leads_to_the_host(job: ShimJob, tmp_path: Path) -> None:
    root, host = tmp_path / "root", tmp_path / "host"
    (root / "etc").mkdir(parents=True)
    host.mkdir()
    (root / "out").symlink_to(host)
    (root / "etc" / "group").symlink_to("pipe")
    for name in ("passwd", "pipe"):
        os.mkfifo(root / "etc" / name)  # which nobody writes to
    report = job.start("/true", root=str(root), uid=UID, gid=UID, user_name="job", volumes=[VolumeMount("/usr", "/out/made")])
    assert (report.step, report.errno) == ("volume", 2)
    assert list(host.iterdir()) == []


def test_steps_that_fail_are_told(job: ShimJob, tmp_path: Path) -> None:
    failing: list[tuple[str, int, dict[str, Any]]] = [
        ("root", 2, {"root": "/no/such"}),
        ("work", 2, {"show": SHOW, "work": "/no/such"}),
        ("volume", 2, {"show": SHOW, "volumes": [VolumeMount("/no/such", "/volumes/x")]}),
        ("idmap", 22, {"show": SHOW, "uid": UID, "gid": UID, "volumes": [VolumeMount("/proc", "/volumes/x", owner=(1, 1))]}),
        ("seccomp", 22, {"seccomp": bytes(8), "protect": ("no-new-privs",)}),
        ("cwd", 2, {"show": SHOW, "cwd": "/home"}),
        ("userns", 1, {"uid": UID, "gid": UID, "user_namespace": True}),  # a job that would be root of the host
    ]
    for number, (step, error, changes) in enumerate(failing):
        with shim_job(tmp_path / str(number)) as job:
            report = job.start("/bin/true", **changes)
            assert (report.started, report.step, report.errno) == (False, step, error), report
