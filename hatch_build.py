"""Compiles the shim, the only C of the project, for wheels and editable installs; `python hatch_build.py` does only that.

The binary needs nothing but the kernel where libc can be linked statically, and libc otherwise. On systems other than Linux nothing
is compiled and the wheel is a pure one: the SDK and the CLI work there, jobs do not run.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIM = "jobrunner/shim/jobrunner-shim"
FLAGS = (
    *("-std=gnu11", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror"),
    *("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"),
    *("-Wl,-z,relro,-z,now,-z,noexecstack", "-s"),
)
LINKAGES = (("-fPIE", "-static-pie"), ("-static",), ("-fPIE", "-pie"))
"""From the best to what every libc allows; static because a dynamic loader costs each job time and private memory."""


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling is generic over a builder's configuration
    """What hatchling calls before it collects the wheel's files."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the shim into the wheel, and tag that with the platform that it is for."""
        if compile_shim(Path(self.root)) is not None:
            build_data["artifacts"].append(SHIM)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_shim(root: Path) -> Path | None:
    """Compile `jobrunner/shim/*.c` below `root`; the path of the binary, or None where there is nothing to compile.

    The binary is replaced whole, so that one that runs is never written to (ETXTBSY, execve(2)). Leaves with one line if there is
    no compiler or if it fails.
    """
    shim = root / SHIM
    sources = sorted(shim.parent.glob("*.c"))
    if sys.platform != "linux" or not sources:
        return None
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory(dir=shim.parent, prefix=".build-") as scratch:
        linkage = _linkage(compiler, Path(scratch))
        binary = Path(scratch, shim.name)
        command = [*compiler, *FLAGS, *linkage, "-o", str(binary), *map(str, sources)]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"cannot compile shim: {compiler[0]} failed, see above")
        binary.chmod(0o755)
        binary.replace(shim)
    return shim


def _linkage(compiler: list[str], scratch: Path) -> tuple[str, ...]:
    """The first of LINKAGES with which this compiler and libc can link a program."""
    probe = scratch / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    reason = ""
    for linkage in LINKAGES:
        command = [*compiler, *FLAGS, *linkage, "-o", str(scratch / "probe"), str(probe)]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except OSError as error:
            sys.exit(f"cannot compile shim: {compiler[0]}: {error.strerror} (install a C compiler and libc's headers)")
        if done.returncode == 0:
            return linkage
        reason = done.stderr.strip()
    sys.exit(f"cannot compile shim: {compiler[0]} links no program: {reason}")


if __name__ == "__main__":
    compile_shim(Path(__file__).resolve().parent)
