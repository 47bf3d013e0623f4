"""What every test may rely on: `requires`, and skips that fail where everything must run.

    pytestmark = pytest.mark.requires("root", "cgroup:memory")

skips on a host that lacks one of them. With JOBRUNNER_MUST_RUN=1 (`make test` sets it where CI=true) every skip is a failure,
but for want of what JOBRUNNER_EXCUSED names (`command:NAME`, or `history` for any of that kind): what cannot be had from here.
"""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Generator

import pytest

from jobrunner.linux.mountinfo import cgroup_mounts, cgroup_version
from tests.support.requires import KINDS, has
from tests.support.timing import at_most

# The fixtures `server` and `private_server`, and `own_disk`.
pytest_plugins = ("tests.support.daemon", "tests.support.stall")

MUST_RUN = os.environ.get("JOBRUNNER_MUST_RUN") == "1"
EXCUSED = os.environ.get("JOBRUNNER_EXCUSED", "").split()


def pytest_configure(config: pytest.Config) -> None:
    os.umask(0o022)  # what tests make is for their jobs to read, whatever the caller keeps for himself
    # A shell without job control lets what it starts in the background ignore Ctrl-C, and nohup the end of the terminal; the CLIs
    # of tests would inherit it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.addinivalue_line(
        "markers", 'generation(version): a fact of cgroup "v1" (also hybrid) or "v2" alone; left out on the other'
    )
    config.addinivalue_line("markers", "linux(major, minor): a fact of this kernel and newer ones; left out on an older one")
    config.addinivalue_line("markers", f"requires(*names): {', '.join(KINDS)}; skipped where one lacks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = "v2" if cgroup_version(cgroup_mounts()) == "v2" else "v1"
    kernel = tuple(int(number) for number in platform.release().split(".")[:2])
    left_out = [item for item in items if any(mark.args != (here,) for mark in item.iter_markers("generation"))]
    left_out += [item for item in items if any(mark.args > kernel for mark in item.iter_markers("linux"))]
    items[:] = [item for item in items if item not in left_out]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    for item in items:
        own = item.get_closest_marker("timeout")
        if own is not None and own.args:
            item.add_marker(pytest.mark.timeout(at_most(own.args[0])), append=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):
        for name in mark.args:
            if not has(name):
                pytest.skip(f"this host lacks {name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    excused = any({name, name.partition(":")[0]} & set(EXCUSED) for mark in item.iter_markers("requires") for name in mark.args)
    if MUST_RUN and report.skipped and not excused and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} must run, and was skipped: {report.longrepr}"
    return report
