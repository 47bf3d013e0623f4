"""A root that can be written to: all of it, nothing of which is kept, and no file of the host that could not be read before."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobrunner.shim.launch import PROTECTIONS, Report, VolumeMount
from tests.support.shim import ShimJob, shim_job

pytestmark = pytest.mark.requires("root", "command:python3")

SHOW = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt")
UID = 0x70000009
MIB = 1 << 20


@pytest.fixture
def job(tmp_path: Path) -> Iterator[ShimJob]:
    with shim_job(tmp_path) as job:
        yield job


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """A directory of root's that jobs see; the way to it is open."""
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(directory.stat().st_mode | 0o055)
    path = tmp_path / "shown"
    path.mkdir(mode=0o755)
    return path


def writing(job: ShimJob, script: str, **changes: Any) -> str:
    """What a script says in a root that it can write to, as a user of its own, without rights and with nothing masked."""
    own = {"show": SHOW, "uid": UID, "gid": UID, "user_name": "job", "tmp_size": 64 * MIB, "protect": PROTECTIONS, "writable": True}
    plan: dict[str, Any] = own | changes
    job.run(f"exec 2>&1; {script}", **plan)
    return job.output().decode()


def test_everything_can_be_written_to_and_nothing_is_kept(job: ShimJob, tmp_path: Path) -> None:
    places = ["/", "/usr", "/usr/bin", "/usr/lib", "/usr/local/bin", "/etc", "/opt"]
    names = [f"{place.rstrip('/')}/jobrunner-made" for place in places]
    script = f"""
        for file in {" ".join(names)}; do echo x > $file || echo no $file; done
        mkdir -p /srv/made /var/lib/made && echo dirs
        rm /usr/bin/env && test ! -e /usr/bin/env && echo removed
        cp /usr/bin/id /usr/bin/id.new && mv /usr/bin/id.new /usr/bin/id && id -u
        mv /usr/bin/sort /usr/bin/sorted && test -x /usr/bin/sorted && echo renamed
        cd /usr/share; rm -r common-licenses && mkdir common-licenses && ls -A common-licenses
        echo job:x >> /etc/passwd && tail -1 /etc/passwd; sed -i s/root/toor/ /etc/group && grep -m1 -o toor: /etc/group; whoami
    """
    paths = ("/usr/bin/env", "/usr/bin/id", "/usr/bin/sort", "/etc/passwd", "/etc/group", "/etc")
    before = [(status.st_ino, status.st_mode, status.st_ctime_ns) for status in map(os.lstat, paths)]
    said = writing(job, script).split()
    assert said == ["dirs", "removed", str(UID), "renamed", "job:x", "toor:", "job"]
    assert [(status.st_ino, status.st_mode, status.st_ctime_ns) for status in map(os.lstat, paths)] == before
    assert not any(os.path.lexists(name) for name in (*names, "/srv/made", "/var/lib/made"))
    with shim_job(tmp_path) as next_one:
        assert writing(next_one, "ls /usr/bin/env; ls -A / | grep -c made") == "/usr/bin/env\n0\n"


ATTEMPTS = """
import json, os, shutil, sys
def tried(path, own, number):
    yield lambda: open(path, "rb")
    yield lambda: (os.chmod(path, 0o644), open(path, "rb"))[1]
    yield lambda: (os.link(path, f"{own}/link{number}"), open(f"{own}/link{number}", "rb"))[1]
    yield lambda: (os.rename(path, f"{own}/moved{number}"), open(f"{own}/moved{number}", "rb"))[1]
    yield lambda: open(shutil.move(os.path.dirname(path), f"{own}/directory{number}") + "/" + os.path.basename(path), "rb")
had = []
for number, path in enumerate(json.load(open("/tmp/list/list"))):
    own = os.path.dirname(path) if os.access(os.path.dirname(path), os.W_OK) else "/usr"
    for one in tried(path, own, number):
        try:
            with one() as file: file.read(1)
        except OSError: continue
        had.append(path)
print(json.dumps(had), sum(os.access(os.path.dirname(path), os.W_OK) for path in json.load(open("/tmp/list/list"))) > 0)
"""


def closed_files(*tops: str) -> list[str]:
    """Every file below that somebody who is neither its owner nor of its group cannot read, and every one in a closed directory."""
    found = []
    for top in tops:
        closed: set[Path] = set()
        for path in (Path(top), *Path(top).rglob("*")):
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode) and (path.parent in closed or not mode & stat.S_IXOTH):
                closed.add(path)
            if stat.S_ISREG(mode) and (path.parent in closed or not mode & stat.S_IROTH):
                found.append(str(path))
    return found


def test_no_file_that_is_closed_to_a_stranger_can_be_read(job: ShimJob, shown: Path) -> None:
    """Each of the host's, with nothing masked, and some more; the directories of some are the job's own, and that is no help."""
    import json

    (shown / "private").mkdir(mode=0o700)
    (shown / "passed").mkdir(mode=0o711)
    for number, (name, mode) in enumerate([("a", 0o600), ("b", 0o640), ("c", 0o400), ("private/d", 0o644), ("passed/e", 0o600)]):
        (shown / name).write_text("secret")
        (shown / name).chmod(mode)
        os.chown(shown / name, number, number)
    witnesses = closed_files("/etc", "/usr", "/opt", str(shown))
    assert {"/etc/shadow", f"{shown}/private/d"} < set(witnesses)
    (shown.parent / "list").mkdir(mode=0o755)
    (shown.parent / "list" / "list").write_text(json.dumps(witnesses))
    show = (*SHOW, str(shown), str(shown.parent / "list"))
    code = ATTEMPTS.replace("/tmp/list", str(shown.parent / "list"))
    assert writing(job, f"/usr/bin/python3 -c '{code}'", show=show) == "[] True\n"


def test_what_is_written_has_the_size_of_tmp(job: ShimJob) -> None:
    script = "head -c 3000000 /dev/zero > /usr/x; stat -c %s /usr/x"
    said = writing(job, script, show=[path for path in SHOW if path != "/etc"], tmp_size=2 * MIB)
    assert said.split()[-1] == str(2 * MIB)
    assert "No space left" in said


def test_files_are_bounded_by_number(job: ShimJob) -> None:
    script = "cd /usr/local; i=0; while true >f$i; do i=$((i+1)); done; echo $i"
    said = writing(job, script, show=[path for path in SHOW if path != "/etc"], tmp_size=MIB)
    assert 500 < int(said.split()[-1]) <= 600


@contextmanager
def mounted(where: Path, *options: str) -> Iterator[None]:
    subprocess.run(["mount", *options, str(where)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


@contextmanager
def mounted_directory(where: Path, *options: str) -> Iterator[None]:
    where.mkdir(mode=0o755)
    with mounted(where, *options):
        where.chmod(0o755)
        yield


def overlaid(lower: str, upper: str, work: str, where: str) -> AbstractContextManager[None]:
    layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
    return mounted(Path(where), "-t", "overlay", "-o", layers, "none")


def job_again(tmp_path: Path, shown: str) -> Report:
    with shim_job(tmp_path) as job:
        return job.start("/bin/true", show=("/usr", shown), uid=UID, gid=UID, tmp_size=MIB, writable=True)


def test_what_is_mounted_below_is_there_and_can_be_written_to(job: ShimJob, shown: Path) -> None:
    below, file = shown / "a b", shown / "file"
    below.mkdir()
    (below / "hidden").write_text("hidden")
    file.write_text("hidden")
    (shown.parent / "other").write_text("over it\n")
    script = f"cd '{shown}/a b' && ls && echo x > new && rm seen && ls && cat ../file && echo x > ../new && echo done"
    with mounted(below, "-t", "tmpfs", "-o", "mode=755", "none"), mounted(file, "--bind", str(shown.parent / "other")):
        (below / "seen").touch()
        assert writing(job, script, show=(*SHOW, str(shown))).split("\n") == ["seen", "new", "over it", "done", ""]
        assert os.listdir(below) == ["seen"]
    assert sorted(os.listdir(shown)) == ["a b", "file"]


def test_a_closed_mount_stays_closed(job: ShimJob, shown: Path) -> None:
    below = shown / "closed"
    below.mkdir(mode=0o755)
    with mounted(below, "-t", "tmpfs", "-o", "mode=700", "none"):
        (below / "key").write_text("secret")
        said = writing(job, f"cat {below}/key; mv {below} {shown}/moved; rmdir {below}; ls {shown}", show=(*SHOW, str(shown)))
    assert said.endswith("\nclosed\n")
    assert "secret" not in said


@contextmanager
def changing_places(one: Path, other: Path) -> Iterator[None]:
    """Two names of a directory, exchanged all the time, as a job may do in a volume; at the end both are as they were."""
    libc, over, first = ctypes.CDLL(None), threading.Event(), one.lstat().st_ino

    def exchange() -> None:
        while not over.is_set() or one.lstat().st_ino != first:
            libc.renameat2(-1, os.fsencode(one), -1, os.fsencode(other), 2)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_link_where_something_was_mounted_leads_no_birth_elsewhere(shown: Path, tmp_path: Path) -> None:
    """Mounts are shown by the paths that mountinfo has, and these may lead elsewhere by then."""
    host, place, link = tmp_path / "host", shown / "a", shown / "b"
    for directory in (host / "m", place / "m"):
        directory.mkdir(mode=0o755, parents=True)
    (host / "m/key").write_text("secret")
    link.symlink_to(host)
    how: dict[str, Any] = {"show": (str(shown), "/usr", "/bin", "/lib", "/lib64"), "uid": UID, "gid": UID, "writable": True}
    started = 0
    with mounted(place / "m", "-t", "tmpfs", "-o", "mode=755", "none"), changing_places(place, link):
        for number in range(8):
            with shim_job(tmp_path / str(number)) as job:
                if job.shell(f"cat {place}/m/key {link}/m/key; true", **how).started:
                    job.wait()
                    started += 1
                    assert b"secret" not in job.output()
    assert started


def test_a_named_root_can_be_written_to(job: ShimJob, shown: Path) -> None:
    for name in ("usr", "etc", "var/lib"):
        (shown / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (shown / name).symlink_to(f"usr/{name}")
    (shown / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (shown / "link").symlink_to("nowhere")
    script = (
        "id -un; echo x >> /etc/passwd; grep -c . /etc/passwd; touch /var/lib/new /new; ls /var/lib; "
        "rm /link; test -L /link || echo gone"
    )
    with mounted(shown / "usr", "--bind", "/usr"):
        said = writing(job, script, show=(), root=str(shown))
        assert said.split() == ["job", "3", "new", "gone"]
    assert (shown / "etc" / "passwd").read_text() == "root:x:0:0::/:/bin/sh\n"
    assert sorted(os.listdir(shown)) == ["bin", "etc", "lib", "lib64", "link", "usr", "var"]


def test_what_names_its_users_leads_no_birth_elsewhere(job: ShimJob, shown: Path, tmp_path: Path) -> None:
    """Its files are read and written by root: neither a volume's, nor /proc's, nor what is closed in the root itself."""
    key, volume = shown / "key", tmp_path / "volume"
    volume.mkdir()
    (shown / "etc").mkdir()
    (shown / "usr").mkdir()
    for name in ("bin", "lib", "lib64"):
        (shown / name).symlink_to(f"usr/{name}")
    for path in (key, volume / "key"):
        path.write_text("secret")
        path.chmod(0o600)
    (shown / "etc" / "passwd").symlink_to("/volumes/x/key")
    (shown / "etc" / "group").symlink_to("/key")
    kernel = Path("/proc/sys/kernel/poweroff_cmd")
    before, how = kernel.read_text(), {"show": (), "root": str(shown), "volumes": [VolumeMount(str(volume), "/volumes/x")]}
    with mounted(shown / "usr", "--bind", "/usr"):
        said = writing(job, "cat /etc/passwd /etc/group /key; echo end", **how)
        with shim_job(tmp_path / "sealed") as other:
            said += writing(other, "cat /etc/passwd /etc/group /key; echo end", **how, writable=False)
        (shown / "etc" / "passwd").unlink()
        (shown / "etc" / "passwd").symlink_to(kernel)
        with shim_job(tmp_path / "kernel") as other:
            said += writing(other, "echo end", **how)
    assert said.count("end\n") == 3
    assert "secret" not in said
    assert {key.read_text(), (volume / "key").read_text()} == {"secret"}
    assert kernel.read_text() == before


def test_neither_setuid_nor_devices_count(job: ShimJob, shown: Path) -> None:
    (shown / "id").write_bytes(Path("/usr/bin/id").read_bytes())
    (shown / "id").chmod(0o4755)
    os.mknod(shown / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    script = f"{shown}/id -u; mv {shown}/id /usr/id; /usr/id -u; cat {shown}/null; mv {shown}/null {shown}/other; cat {shown}/other"
    said = writing(job, script, show=(*SHOW, str(shown)), protect=("capabilities",)).split("\n")
    assert said[:2] == [str(UID), str(UID)]
    assert [line.rpartition(": ")[2] for line in said[2:4]] == ["Permission denied"] * 2


def test_a_tree_without_a_bottom_is_no_trap(job: ShimJob, shown: Path) -> None:
    (shown / "/".join(["d"] * 300)).mkdir(mode=0o755, parents=True)
    go = "for i in $(seq {}); do cd d; done"
    script = f"cd {shown}; {go.format(3)}; touch new && echo yes; {go.format(200)}; touch x || ls"
    said = writing(job, script, show=(*SHOW, str(shown)))
    assert said.startswith("yes\n")
    assert said.endswith("denied\nd\n")


def test_a_container_s_own_overlay_can_be_below_and_one_more_cannot(job: ShimJob, shown: Path, tmp_path: Path) -> None:
    """The kernel puts two file systems on each other and no more; nothing is id-mapped, which overlays cannot be."""
    layers = tmp_path / "layers"
    with mounted_directory(layers, "-t", "tmpfs", "none"):
        places = [layers / name for name in ("lower", "upper", "work", "once", "upper2", "work2", "twice")]
        for place in places:
            place.mkdir(mode=0o755)
        lower, upper, work, once, upper2, work2, twice = map(str, places)
        (layers / "lower" / "file").write_text("low\n")
        with overlaid(lower, upper, work, once):
            script = f"cd {once}; cat file; rm file; mkdir d && echo x > d/x && ls"
            assert writing(job, script, show=(*SHOW, once)).split() == ["low", "d"]
            assert os.listdir(once) == ["file"]
            with overlaid(once, upper2, work2, twice):
                report = job_again(tmp_path, twice)
    assert (report.step, report.errno, report.detail) == ("overlay", errno.EINVAL, twice)


def test_directories_that_do_not_fit_fail_the_start(job: ShimJob, shown: Path) -> None:
    (shown / "etc").mkdir()
    for number in range(20):
        (shown / "etc" / str(number)).write_bytes(bytes(4096))
    report = job.start("/bin/true", root=str(shown), uid=UID, gid=UID, tmp_size=8192, writable=True)
    assert (report.step, report.errno) == ("overlay", errno.ENOSPC)
