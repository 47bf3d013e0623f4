"""Jobs in the container, asked for by the host's CLI: limits by effect, namespaces, and nothing that is left of them."""

from __future__ import annotations

from tests.docker.stack import Cli, Stack, run

NAMESPACES = ("pid", "mnt", "net", "ipc", "uts", "cgroup")
READ_NAMESPACES = "; ".join(f"readlink /proc/self/ns/{name}" for name in NAMESPACES)


def test_the_memory_limit_kills_and_is_told(cli: Cli) -> None:
    done = cli("run", "--memory", "64MiB", "--", "tail", "/dev/zero", check=False)
    assert done.code == 137
    assert "out of memory: the limit is 67108864 bytes" in done.err


def test_the_cpu_limit_holds_for_two_spinners(cli: Cli) -> None:
    spin = "i=0; while :; do i=$((i+1)); done"
    job_id = cli.start("--cpus", "0.5", "--timeout", "6s", "--", "sh", "-c", f"{spin} & {spin}")
    cli("wait", job_id, check=False)
    usage = cli.info(job_id)["usage"]
    # Loosely: a loaded host gives less, and the kernel hands a quota out in slices. One spinner without a limit uses 1, two 2.
    assert 0.1 < (usage["cpu_user"] + usage["cpu_system"]) / usage["wall"] < 0.75


def test_the_pids_limit_stops_forks(cli: Cli) -> None:
    done = cli("run", "--pids", "16", "--", "sh", "-c", "for i in $(seq 40); do sleep 30 & done", check=False)
    assert done.code == 2
    assert "Cannot fork" in done.err


def test_a_root_can_be_written_to(cli: Cli) -> None:
    """The container's own root is an overlay: another one on it is the last that the kernel takes."""
    script = (
        "touch /usr/new /etc/new && echo x >> /etc/passwd && rm /usr/bin/env && echo written; cat /etc/resolv.conf | wc -c; id -u"
    )
    written, resolver, uid = cli("run", "--writable", "--", "sh", "-c", script).out.split()
    assert (written, int(resolver) > 0, uid != "0") == ("written", True, True)
    assert "env" in cli("run", "--", "ls", "/usr/bin/env").out


def test_namespaces_are_fresh_for_each_job(stack: Stack, cli: Cli) -> None:
    other = cli.start("sh", "-c", f"{READ_NAMESPACES}; exec sleep 60")  # lives, so that its numbers are not given again
    job = cli("run", "--", "sh", "-c", READ_NAMESPACES).out.split()
    container, other_job = stack.inside(READ_NAMESPACES).split(), cli("log", other).out.split()
    cli("stop", "--grace", "0", other)
    assert [len(set(three)) for three in zip(container, other_job, job, strict=True)] == [3] * len(NAMESPACES)


def test_a_job_sees_its_own_processes_and_its_own_loopback(cli: Cli) -> None:
    seen = cli(
        "run", "--", "sh", "-c", "echo /proc/[0-9]*; tail -n +3 /proc/net/dev | cut -d: -f1; cat /sys/class/net/lo/operstate"
    ).out
    processes, *interfaces = seen.split("\n")
    assert processes.split() == ["/proc/1", "/proc/2"]
    assert [name.strip() for name in interfaces[:-2]] == ["lo"]


def test_shims_are_reaped_by_pid_1(stack: Stack, cli: Cli) -> None:
    for _ in range(5):
        cli("run", "--", "true")
    assert stack.inside("cat /proc/1/comm").strip() == "tini"
    assert stack.inside("cat /proc/[0-9]*/stat | grep ') Z ' || true") == ""


def test_cgroups_of_ended_jobs_are_gone(stack: Stack, cli: Cli) -> None:
    job_id = cli.start("sleep", "60")
    find = f"find /sys/fs/cgroup -type d -name {job_id}"
    assert stack.inside(find) != ""
    cli("stop", "--grace", "0", job_id)
    assert stack.inside(find) == ""


def test_cgroups_of_jobs_are_below_the_container_s(stack: Stack, cli: Cli) -> None:
    job_id = cli.start("sleep", "60")
    directories = run(["find", "/sys/fs/cgroup", "-type", "d", "-name", job_id]).out.splitlines()
    cli("stop", "--grace", "0", job_id)
    container = stack.container()
    assert directories
    assert [path for path in directories if container not in path] == []
