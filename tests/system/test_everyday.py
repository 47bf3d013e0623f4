"""What people run all day runs in a job as it does in a shell."""

from __future__ import annotations

import base64
import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobrunner import Limits, Stream
from tests.support.runner import open_runner, output, run_output, shell
from tests.support.timing import at_most

pytestmark = [pytest.mark.requires("root"), pytest.mark.timeout(120)]

IN_A_DIRECTORY = 'set -e; cd "$(mktemp -d)"; export HOME=$PWD; '
SECONDS = at_most(60)


async def ran(path: Path, script: str, **spec: object) -> str:
    """The output of a script that has not failed."""
    return await ran_after(path, (), IN_A_DIRECTORY + script, **spec)


async def ran_after(path: Path, before: Sequence[str], script: str, **spec: object) -> str:
    """Likewise, after jobs that have done what it builds upon."""
    async with open_runner(path, workspaces=True) as runner:
        data = b""
        for one in (*before, script):
            info, data = await run_output(runner, shell(f"set -e; {one}", **spec), SECONDS)
            assert info.status == "completed", data.decode(errors="replace")
    return data.decode()


CLONE_AND_BUILD = (
    "git init -q -b main repo; cd repo; git config user.email a@b; git config user.name a; "
    "printf '#include <stdio.h>\\nint main(void) { puts(\"built\"); }\\n' >one.c; printf 'all: one\\n' >Makefile; "
    "git add .; git commit -qm first; cd ..; git clone -q repo copy; cd copy; make -s -j2"
)
VENV = (
    "/usr/bin/python3 -m venv env; echo $WHEEL | base64 -d >hello_job-1.0-py3-none-any.whl; "
    "env/bin/pip install -q --no-index --disable-pip-version-check ./*.whl; env/bin/hello-job"
)


@pytest.mark.requires("command:git", "command:cc", "command:make", "command:python3")
async def test_what_one_job_builds_in_a_workspace_the_next_one_of_another_uid_goes_on_with(tmp_path: Path) -> None:
    """git takes a repository of another owner for an attack: safe.directory, git-config(1)."""
    before = (f"({CLONE_AND_BUILD}); ({VENV})",)
    script = "cd copy; ./one; git log --format=%s; touch one.c; make -s; git pull -q; cd ..; env/bin/hello-job; "
    script += "env/bin/pip list --format=freeze"
    said = (await ran_after(tmp_path, before, script, workspace="build", env={"WHEEL": wheel()})).splitlines()
    assert said[:3] == ["built", "first", "hello from a wheel"]
    assert "hello-job==1.0" in said


async def test_a_job_has_a_name_and_a_number_that_agree(tmp_path: Path) -> None:
    name, same, uid, known = (await ran(tmp_path, 'whoami; id -un; id -u; getent passwd "$(id -un)" | cut -d: -f3')).split()
    assert (name, uid) == (same, known)


async def test_output_by_its_path_goes_where_it_says(tmp_path: Path) -> None:
    async with open_runner(tmp_path) as runner:
        job = await runner.start(shell("echo a >/dev/stdout; echo b | tee /dev/stderr; echo c >>/dev/fd/2; echo d >&1"))
        out, err = await output(job, Stream.STDOUT), await output(job, Stream.STDERR)
    assert (out, err) == (b"a\nb\nd\n", b"b\nc\n")


async def test_input_is_empty_and_no_terminal(tmp_path: Path) -> None:
    assert (await ran(tmp_path, "cat; test -t 0 || echo no terminal; read line || echo end")).splitlines() == ["no terminal", "end"]


async def test_utf8_is_the_locale(tmp_path: Path) -> None:
    assert await ran(tmp_path, "printf 'äöü' | wc -m; locale charmap") == "3\nUTF-8\n"


async def test_a_thousand_short_children(tmp_path: Path) -> None:
    """Reaped as they end: more than the limit of tasks in all."""
    few = Limits(pids=32)
    assert await ran(tmp_path, "i=0; while [ $i -lt 1000 ]; do /bin/true; i=$((i+1)); done; echo $i", limits=few) == "1000\n"


async def test_orphans_are_reaped(tmp_path: Path) -> None:
    zombies = "cat /proc/[0-9]*/stat 2>/dev/null | grep -q ') Z '"
    script = f"for i in $(seq 200); do (sh -c true &); done; while {zombies}; do sleep 0.05; done; echo none"
    assert await ran(tmp_path, script) == "none\n"


@pytest.mark.requires("command:git")
async def test_git(tmp_path: Path) -> None:
    script = (
        "git init -q -b main repo; cd repo; git config user.email a@b; git config user.name a; echo x >file; git add file; "
        "git commit -qm first; cd ..; git clone -q repo copy; cd copy; git log --format=%s; git status --porcelain; git fsck"
    )
    assert (await ran(tmp_path, script)).splitlines()[0] == "first"


def wheel() -> str:
    """A wheel of one module, in base64."""
    data = io.BytesIO()
    info = "hello_job-1.0.dist-info"
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("hello_job.py", "def main():\n    print('hello from a wheel')\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hello-job\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\nhello-job = hello_job:main\n")
        archive.writestr(f"{info}/RECORD", "")
    return base64.b64encode(data.getvalue()).decode()


@pytest.mark.requires("command:python3")
async def test_a_virtual_environment_and_a_wheel(tmp_path: Path) -> None:
    assert await ran(tmp_path, VENV, env={"WHEEL": wheel()}) == "hello from a wheel\n"


@pytest.mark.requires("command:cc", "command:make")
async def test_a_build_in_c(tmp_path: Path) -> None:
    script = (
        "printf '#include <stdio.h>\\nint main(void) { puts(\"built\"); }\\n' >one.c; printf 'all: one\\n' >Makefile; "
        "make -s -j2 CFLAGS='-O2 -fsanitize=address'; ASAN_OPTIONS=detect_leaks=1 ./one"
    )
    assert await ran(tmp_path, script) == "built\n"


INSTALLS = r"""
printf '#include <stdio.h>\nint main(void) { puts("mine"); return 0; }\n' >mine.c; cc -o mine mine.c
install -m 755 mine /usr/bin/mine; mine; install -m 755 mine /usr/bin/env; env; cp -f mine /usr/bin/sort; sort
mkdir -p p/DEBIAN p/usr/share/p; echo packed >p/usr/share/p/file
printf 'Package: p\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: p\n' >p/DEBIAN/control
dpkg-deb -b p p.deb >/dev/null; mkdir -p /var/lib/dpkg/updates /var/lib/dpkg/info /var/lib/dpkg/triggers /var/log
touch /var/lib/dpkg/status; dpkg --force-not-root,bad-path -i p.deb >/dev/null; cat /usr/share/p/file; dpkg-query -W p
echo x = 5 >/usr/lib/python3/dist-packages/mine.py; /usr/bin/python3 -c 'import mine; print(mine.x)'
ldconfig; tar -C /usr -cf t.tar share/common-licenses; tar -C /usr -xf t.tar; sed -i s/root/toor/ /etc/group
echo 127.0.0.1 here >>/etc/hosts; grep -c here /etc/hosts
"""


@pytest.mark.requires("command:cc", "command:dpkg", "command:python3")
async def test_what_installs_programs_does_so_in_a_root_that_can_be_written_to(tmp_path: Path) -> None:
    said = await ran(tmp_path, INSTALLS, writable=True)
    assert said.split() == ["mine", "mine", "mine", "packed", "p", "1", "5", "1"]


@pytest.mark.requires("command:script")
async def test_a_shell_with_job_control_on_a_terminal(tmp_path: Path) -> None:
    inner = "sleep 0.2 & jobs; fg; echo code $?"
    said = await ran(tmp_path, f"script -qec \"bash -imc '{inner}'\" /dev/null")
    assert "Running" in said and "code 0" in said
    assert "no job control" not in said


@pytest.mark.requires("command:python3")
async def test_a_server_on_loopback(tmp_path: Path) -> None:
    script = (
        "/usr/bin/python3 -m http.server --bind 127.0.0.1 8000 >/dev/null 2>&1 & echo found >page; "
        "/usr/bin/python3 -c 'import time, urllib.request\n"
        "for _ in range(200):\n"
        '    try: print(urllib.request.urlopen("http://127.0.0.1:8000/page").read().decode(), end=""); break\n'
        "    except OSError: time.sleep(0.05)'"
    )
    assert await ran(tmp_path, script) == "found\n"


@pytest.mark.requires("command:python3")
async def test_processes_and_locks_of_python(tmp_path: Path) -> None:
    """POSIX semaphores and shared memory are files in /dev/shm."""
    code = (
        "from multiprocessing import Pool, shared_memory\n"
        "block = shared_memory.SharedMemory(create=True, size=4096); block.close(); block.unlink()\n"
        "with Pool(2) as pool: print(sum(pool.map(abs, range(-10, 0))))\n"
    )
    assert await ran(tmp_path, 'echo "$CODE" >main.py; /usr/bin/python3 main.py', env={"CODE": code}) == "55\n"


@pytest.mark.requires("command:node")
async def test_node(tmp_path: Path) -> None:
    code = "const {Worker} = require('worker_threads'); new Worker('console.log(6*7)', {eval: true})"
    assert await ran(tmp_path, f'node -e "{code}"') == "42\n"


@pytest.mark.requires("command:java")
async def test_a_jvm(tmp_path: Path) -> None:
    assert "Runtime Environment" in await ran(tmp_path, "java -Xmx64m -version 2>&1", limits=Limits(memory=512 << 20))


@pytest.mark.requires("command:java")
async def test_a_jvm_sees_its_limits(tmp_path: Path) -> None:
    """A quarter of its memory is its heap, or half of so little, and half a processor is one."""
    for memory, heap in ((256 << 20, 126 << 20), (1 << 30, 256 << 20)):
        options = "-Xlog:os+container=trace -XX:+PrintFlagsFinal"
        said = await ran(tmp_path, f"java {options} -version 2>&1", limits=Limits(memory=memory, cpus=0.5))
        found = re.search(r"MaxHeapSize += (\d+)", said)
        assert found and int(found[1]) == heap
        assert re.search(rf"Memory Limit is: {memory}\b", said)
        assert re.search(r"CPU Quota is: 50000\b", said)
        assert re.search(r"active_processor_count: 1\b", said, re.IGNORECASE)


@pytest.mark.requires("command:node")
async def test_node_sees_its_memory_limit(tmp_path: Path) -> None:
    assert await ran(tmp_path, "node -p 'process.constrainedMemory()'", limits=Limits(memory=256 << 20)) == f"{256 << 20}\n"


@pytest.mark.requires("command:strace", "command:gdb")
async def test_debuggers_on_ones_own_child(tmp_path: Path) -> None:
    script = "strace -f -e trace=execve sh -c '/bin/true' 2>&1 | grep -c execve; "
    script += "sleep 60 & gdb -q -batch -p $! -ex 'info inferiors' 2>/dev/null | grep -c process"
    first, second = (await ran(tmp_path, script)).split()
    assert int(first) >= 2 and int(second) >= 1
