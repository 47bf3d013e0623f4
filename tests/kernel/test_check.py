"""`jobrunnerd check` on this host, and where something was really taken away from it: line, remedy, the server's refusal."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobrunner.shim import binary_path

pytestmark = [pytest.mark.requires("root", "command:unshare", "command:setpriv"), pytest.mark.timeout(120)]

JOBRUNNERD = shlex.quote(str(Path(sys.executable).with_name("jobrunnerd")))
Found = dict[str, dict[str, str]]

READ_ONLY_CGROUPS = 'for m in $(grep -o " /sys/fs/cgroup[^ ]* " /proc/mounts); do mount -o remount,bind,ro $m; done'
NO_PIDS = "umount -l /sys/fs/cgroup/pids"
ON_V1 = Path("/sys/fs/cgroup/pids").is_dir()


def check(before: str = "true", wrap: str = "", options: str = "") -> tuple[int, Found]:
    """Run it in a mount namespace of its own, in which `before` was done; exit code, and the findings by name."""
    script = f"{before} && exec {wrap} {JOBRUNNERD} check --json {options}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)}


def twice(before: str, mend: str, wrap: str = "", options: str = "") -> tuple[Found, Found]:
    """The findings where `before` was done, and once `mend` was done after it, in the same namespaces."""
    look = f"{{ {wrap} {JOBRUNNERD} check --json {options} || :; }}"
    script = f"{before} && {look} && echo , && {mend} && {look}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=90)
    assert done.stderr == ""
    first, second = json.loads(f"[{done.stdout}]")
    return tuple({finding["name"]: finding for finding in found} for found in (first, second))  # type: ignore[return-value]


def in_user_namespace(script: str) -> Found:
    """The findings in a user namespace, whose settings of user.* are its own: outside of it nothing changes."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"{script} && exec {JOBRUNNERD} check --json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert done.stderr == ""
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


def sysctl_of(remedy: str) -> str:
    """The commands of a remedy that are a setting of the kernel's."""
    return " && ".join(re.findall(r"sysctl -w [a-z_.]+=\d+", remedy)).replace("sysctl -w", "sysctl -qw")


def refusal(before: str, directory: Path) -> tuple[int, str]:
    """Exit code and words of a server that is started where `before` was done."""
    script = f"{before} && exec {JOBRUNNERD} dev --listen 127.0.0.1:0 --dir {shlex.quote(str(directory))}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


def hide(path: Path, scratch: Path) -> str:
    """Shell that hides one file of a directory: an overlay whose upper layer has a whiteout of it (overlayfs)."""
    upper, work = scratch / "upper", scratch / "work"
    upper.mkdir()
    work.mkdir()
    layers = f"lowerdir={path.parent},upperdir={upper},workdir={work}"
    return f"mknod {upper}/{path.name} c 0 0 && mount -t overlay -o {shlex.quote(layers)} overlay {shlex.quote(str(path.parent))}"


@pytest.fixture(scope="module")
def here() -> tuple[int, Found]:
    return check()


def test_nothing_is_missing_on_this_host(here: tuple[int, Found]) -> None:
    code, found = here
    assert (code, {name for name, finding in found.items() if finding["level"] == "missing"}) == (0, set())


def test_each_thing_has_its_line(here: tuple[int, Found]) -> None:
    namespaces = {f"namespace {name}" for name in ("pid", "mount", "network", "ipc", "uts", "cgroup")}
    cgroups = {"cgroup", "cgroup cpu", "cgroup memory", "cgroup pids", "cgroup io", "cgroup.kill"}
    others = {
        "root",
        "capabilities",
        "kernel",
        "libseccomp",
        "job uids",
        "shim",
        "clone3",
        "fresh /proc",
        "root of its own",
        "seccomp",
        "pivot_root",
        "keyring",
        "state directory",
        "inotify",
        "open files",
    }
    assert set(here[1]) == namespaces | cgroups | others | {
        "processes",
        "lifetime",
        "apparmor",
        "user namespaces",
        "work directories",
        "workspaces",
        "core dumps",
        "out of memory",
        "job",
        "writable root",
    }


def test_what_is_not_ok_has_a_remedy(here: tuple[int, Found]) -> None:
    assert [name for name, finding in here[1].items() if (finding["level"] == "ok") == bool(finding["remedy"])] == []


def test_it_leaves_no_cgroup(here: tuple[int, Found]) -> None:
    assert here[1]["cgroup"]["level"] == "ok"
    assert [path for path, _, _ in os.walk("/sys/fs/cgroup") if "jobrunner-check" in path] == []


def test_a_line_of_text_has_level_name_and_what() -> None:
    done = subprocess.run(["sh", "-c", f"{JOBRUNNERD} check"], capture_output=True, text=True, check=False)
    assert "ok       root: effective user id 0\n" in done.stdout


@pytest.mark.skipif(not ON_V1, reason="a v2 tree without controllers is to be had where v1 holds them")
def test_a_v2_tree_without_controllers_is_told() -> None:
    code, found = check("for m in $(grep -o ' /sys/fs/cgroup/[^ ]* cgroup ' /proc/mounts | cut -d' ' -f2); do umount -l $m; done")
    lacking = {name for name, finding in found.items() if name.startswith("cgroup ") and finding["level"] == "missing"}
    assert (code, lacking) == (3, {"cgroup cpu", "cgroup memory", "cgroup pids", "cgroup io"})
    assert found["cgroup"]["what"] == "v2, can be written to"
    assert "pids in the cgroup.subtree_control" in found["cgroup pids"]["remedy"]


def test_a_read_only_cgroup_tree_is_told() -> None:
    code, found = check(READ_ONLY_CGROUPS)
    assert code == 3
    assert found["cgroup"]["level"] == "missing"
    assert "Read-only file system" in found["cgroup"]["what"]
    assert "Delegate=yes" in found["cgroup"]["remedy"]


@pytest.mark.skipif(not ON_V1, reason="controllers are mounts of their own on cgroup v1 only")
def test_a_tree_of_which_a_part_is_read_only_is_told_and_left_as_it_was() -> None:
    _, found = check("mount -o bind,ro /sys/fs/cgroup/memory /sys/fs/cgroup/memory")
    assert "Read-only file system" in found["cgroup"]["what"]
    assert [path for path, _, _ in os.walk("/sys/fs/cgroup") if "jobrunner-check" in path] == []


@pytest.mark.parametrize("where", ["/proc/state", "/dev/null"])
def test_a_state_directory_that_cannot_be_made_is_told(where: str) -> None:
    code, found = check(options=f"--state-dir {where}")
    assert (code, found["state directory"]["level"]) == (3, "missing")


@pytest.mark.skipif(not ON_V1, reason="controllers are mounts of their own on cgroup v1 only")
def test_a_controller_that_is_not_there_is_told() -> None:
    code, found = check(NO_PIDS)
    assert (code, found["cgroup pids"]["level"]) == (3, "missing")
    assert found["cgroup pids"]["what"] == "cannot apply limit pids: no pids cgroup controller is mounted"
    assert "mount -t cgroup -o pids cgroup /sys/fs/cgroup/pids" in found["cgroup pids"]["remedy"]


@pytest.mark.skipif(not ON_V1, reason="controllers are mounts of their own on cgroup v1 only")
def test_a_limit_that_may_be_missing_is_limited(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('allow_missing = ["pids"]\n')
    code, found = check(NO_PIDS, options=f"--config {tmp_path}/settings.toml")
    assert (code, found["cgroup pids"]["level"]) == (0, "limited")


@pytest.mark.parametrize("name", ["sys_admin", "net_admin"])
def test_a_capability_that_is_not_there_is_told(name: str) -> None:
    code, found = check(wrap=f"setpriv --bounding-set -{name} --")
    assert (code, found["capabilities"]["level"]) == (3, "missing")
    assert found["capabilities"]["what"] == f"CAP_{name.upper()} not there"
    assert f"--cap-add {name.upper()}" in found["capabilities"]["remedy"]


def test_a_step_of_a_birth_that_is_denied_is_told_as_that() -> None:
    _, found = check(wrap="setpriv --bounding-set -net_admin --")
    assert found["namespace network"]["what"] == "network: lo: Operation not permitted"


def test_what_may_not_be_made_is_told_and_the_remedies_help() -> None:
    names = {"namespace uts": "uts_namespaces", "user namespaces": "user_namespaces", "inotify": "inotify_instances"}
    lack = "sysctl -qw " + " ".join(f"user.max_{setting}=0" for setting in names.values())
    found = in_user_namespace(lack)
    assert [found[name]["level"] for name in names] == ["missing", "limited", "missing"]
    assert [found[name]["what"].partition(": no volume")[0] for name in names] == [
        "clone: No space left on device",
        "clone: No space left on device",
        "no instance: Too many open files",
    ]
    assert found["namespace ipc"]["level"] == "ok"
    mended = in_user_namespace(" && ".join([lack, *(sysctl_of(found[name]["remedy"]) for name in names)]))
    assert [mended[name]["level"] for name in names] == ["ok"] * 3


def test_a_masked_proc_is_told() -> None:
    # From outside the user namespace, so that it cannot be taken off in it: as in a rootless container (mount_namespaces(7)).
    code, found = check("mount -t tmpfs tmpfs /proc/bus", wrap="unshare --user -r --mount")
    assert (code, found["fresh /proc"]["level"]) == (3, "missing")
    assert found["fresh /proc"]["what"] == "mount: /proc: Operation not permitted"
    assert "systempaths=unconfined" in found["fresh /proc"]["remedy"]


def test_a_shim_that_is_not_there_is_told(tmp_path: Path) -> None:
    code, found = check(hide(binary_path(), tmp_path))
    assert (code, found["shim"]["level"]) == (3, "missing")
    assert "make shim" in found["shim"]["remedy"]


def test_a_library_that_is_not_there_is_told() -> None:
    code, found = check("for f in $(ldconfig -p | sed -n 's/.*libseccomp.so.2 .*=> //p'); do mount --bind /dev/null $f; done")
    assert (code, found["libseccomp"]["level"]) == (3, "missing")
    assert "apt-get install libseccomp2" in found["libseccomp"]["remedy"]


def test_another_user_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    _, found = check(wrap="unshare --user --map-user=1000")
    assert found["root"]["level"] == "limited"
    assert "namespace user" in found


def test_few_open_files_are_told() -> None:
    _, found = check(wrap="prlimit --nofile=256")
    assert found["open files"]["level"] == "limited"
    assert "LimitNOFILE=" in found["open files"]["remedy"]


def test_a_container_s_pid_namespace_is_told() -> None:
    _, found = check(wrap="unshare --pid --fork --mount-proc")
    assert (found["lifetime"]["level"], found["namespace pid"]["level"]) == ("limited", "ok")


def test_a_server_refuses_in_the_same_words_without_a_shim(tmp_path: Path) -> None:
    hidden = hide(binary_path(), tmp_path)
    code, words = refusal(hidden, tmp_path / "dev")
    finding = f"{binary_path()} is not there"
    assert (code, words.startswith(f"jobrunnerd: cannot run jobs: shim: {finding}; ")) == (3, True)


@pytest.mark.skipif(not ON_V1, reason="controllers are mounts of their own on cgroup v1 only")
def test_a_server_refuses_in_the_same_words_without_a_controller(tmp_path: Path) -> None:
    _, found = check(NO_PIDS)
    code, words = refusal(NO_PIDS, tmp_path / "dev")
    finding = found["cgroup pids"]
    assert (code, words) == (3, f"jobrunnerd: cannot run jobs: cgroup pids: {finding['what']}; {finding['remedy']}\n")


def test_a_server_refuses_in_the_same_words_on_a_read_only_tree(tmp_path: Path) -> None:
    code, words = refusal(READ_ONLY_CGROUPS, tmp_path / "dev")
    assert code == 3
    assert "Read-only file system; " in words
    assert "Delegate=yes" in words


def test_few_open_files_are_mended_as_told() -> None:
    found, mended = twice("ulimit -Sn 256", "ulimit -Sn 1600")
    assert (found["open files"]["level"], mended["open files"]["level"]) == ("limited", "ok")
    assert "ulimit -n 1600;" in found["open files"]["remedy"]


def test_a_bound_on_processes_is_told(tmp_path: Path) -> None:
    parent = Path("/sys/fs/cgroup/pids" if ON_V1 else "/sys/fs/cgroup") / f"jobrunner-test-{os.getpid()}"
    parent.mkdir()
    try:
        (parent / "pids.max").write_text("400")
        script = f"echo 0 > {parent}/cgroup.procs && exec {JOBRUNNERD} check --json"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False, timeout=60)
    finally:
        for directory, _, _ in os.walk(parent, topdown=False):
            Path(directory).rmdir()
    all_found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    found = all_found["processes"]
    assert (found["level"], found["what"].partition(",")[0]) == ("limited", "this cgroup allows 400")
    assert "--pids-limit -1" in found["remedy"]
    of_a_job = all_found["cgroup pids"]
    assert (of_a_job["level"], of_a_job["what"]) == (
        "limited",
        "pids: 512 were asked for, and all jobs together have 400, by a cgroup above them",
    )
    assert "TasksMax=" in of_a_job["remedy"]


@pytest.mark.parametrize(
    ("before", "mend"),
    [
        ("umount -l /proc", "mount -t proc proc /proc"),
        ("mount -t proc -o subset=pid proc /proc", "mount -t proc proc /proc"),
    ],
)
def test_a_proc_that_is_not_there_whole_is_told_and_the_remedy_helps(before: str, mend: str) -> None:
    found, mended = twice(before, mend)
    assert {name for name, finding in found.items() if finding["level"] == "missing"} >= {"/proc"}
    assert "cannot be read: " in found["/proc"]["what"]
    assert found["/proc"]["remedy"].startswith(mend)
    assert "/proc" not in mended


@pytest.mark.parametrize("hidden", ["/sys", "/sys/fs/cgroup"])
def test_a_cgroup_tree_that_cannot_be_seen_is_told(hidden: str) -> None:
    code, found = check(f"mount -t tmpfs tmpfs {hidden}")
    assert (code, found["cgroup"]["level"]) == (3, "missing")
    assert found["cgroup"]["what"] == "cannot limit jobs: no cgroup file system is mounted"
    assert os.listdir(hidden) != []


@pytest.mark.parametrize(
    ("denied", "levels"),
    [
        ("pivot_root=EACCES", {"root of its own": "missing", "pivot_root": "limited"}),  # AppArmor, before Linux 6.7
        ("keyctl=EPERM,pivot_root=EPERM", {"keyring": "ok", "pivot_root": "limited", "job": "ok"}),
        (
            "keyctl=EDQUOT,seccomp=EINVAL,mount_setattr=EPERM",
            {"keyring": "missing", "seccomp": "missing", "namespace mount": "missing", "job": "limited"},
        ),
    ],
)
def test_what_a_filter_around_the_server_denies_is_told(denied: str, levels: dict[str, str]) -> None:
    _, found = check(wrap=f"{shlex.quote(sys.executable)} {Path(__file__).parents[1]}/support/deny.py {denied}")
    assert {name: found[name]["level"] for name in levels} == levels
    remedies = [found[name]["remedy"] for name, level in levels.items() if level != "ok"]
    assert all(remedies)
    assert not any("no remedy is known" in remedy for remedy in remedies)


def test_a_handler_of_core_dumps_is_told(tmp_path: Path) -> None:
    (tmp_path / "pattern").write_text("|/usr/lib/systemd/systemd-coredump %P %u\n")
    code, found = check(f"mount --bind {tmp_path}/pattern /proc/sys/kernel/core_pattern")
    assert (code, found["core dumps"]["level"]) == (0, "ok")
    assert "nor starts /usr/lib/systemd/systemd-coredump" in found["core dumps"]["what"]


def test_a_socket_for_core_dumps_is_told(tmp_path: Path) -> None:
    """Linux 6.16, which connects to it also for who may have no core."""
    (tmp_path / "pattern").write_text("@@/run/coredump.socket\n")
    code, found = check(f"mount --bind {tmp_path}/pattern /proc/sys/kernel/core_pattern")
    assert (code, found["core dumps"]["level"]) == (0, "limited")
    assert "hears of each job that crashes" in found["core dumps"]["what"]


def test_few_ids_are_told_and_the_remedy_helps(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('job_uids = "1000:100"\n')
    for options, level in (("", "missing"), (f"--config {tmp_path}/settings.toml", "ok")):
        script = f"echo up; read go; exec {JOBRUNNERD} check --json {options}"
        command = ["unshare", "--user", "sh", "-c", script]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == "up\n"
            for name in ("uid_map", "gid_map"):
                Path("/proc", str(process.pid), name).write_text("0 0 2000\n")
            out, _ = process.communicate("go\n", timeout=60)
        found = {finding["name"]: finding for finding in json.loads(out)}["job uids"]
        assert found["level"] == level, found
        assert found["what"].endswith("which has 0 to 1999") == (level == "missing")
