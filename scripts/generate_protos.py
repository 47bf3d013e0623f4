#!/usr/bin/env python3
"""Generates jobrunner/wire/generated and jobrunner/wire/descriptors.binpb from protos/; with --check tells whether they are stale.

Needs the development tools: protoc comes with grpcio-tools, the plugin is betterproto2_compiler, which formats with ruff. All three
are pinned by the lock file, because the output is compared byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
WIRE = ROOT / "jobrunner" / "wire"
GENERATED = ("generated", "descriptors.binpb")


def generate(out: Path) -> None:
    """Run protoc over every proto of the repository into `out`; raises CalledProcessError."""
    code = out / "generated"
    code.mkdir()
    plugin = Path(sys.executable).parent / "protoc-gen-python_betterproto2"
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        f"-I{PROTOS}",
        f"--plugin=protoc-gen-python_betterproto2={plugin}",
        f"--python_betterproto2_out={code}",
        "--python_betterproto2_opt=server_generation=async",
        "--python_betterproto2_opt=client_generation=async",
        f"--descriptor_set_out={out / 'descriptors.binpb'}",
        "--include_imports",
        *sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto")),
    ]
    # The plugin formats with the ruff that PATH names, by the settings of the working directory: the pinned ruff, no settings.
    path = f"{plugin.parent}:/usr/bin:/bin"
    subprocess.run(command, check=True, cwd=out, env={"PATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def files(root: Path) -> dict[str, Path]:
    """Generated files under `root`, by their path relative to it."""
    found = [path for name in GENERATED for path in ((root / name).rglob("*") if (root / name).is_dir() else [root / name])]
    return {str(path.relative_to(root)): path for path in found if path.is_file() and path.suffix != ".pyc"}


def stale(fresh: dict[str, Path], committed: dict[str, Path]) -> list[str]:
    """Names of generated files that are missing, left over or different."""
    names = sorted(fresh.keys() | committed.keys())
    same = [name for name in fresh.keys() & committed.keys() if filecmp.cmp(fresh[name], committed[name], shallow=False)]
    return [name for name in names if name not in same]


def replace(source: Path) -> None:
    """Put the generated files of `source` in the place of the committed ones."""
    shutil.rmtree(WIRE / "generated", ignore_errors=True)
    shutil.copytree(source / "generated", WIRE / "generated")
    shutil.copy(source / "descriptors.binpb", WIRE / "descriptors.binpb")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the committed code is stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        try:
            generate(out)
        except subprocess.CalledProcessError as exc:
            print(f"cannot generate protos: {exc.stderr.strip()}", file=sys.stderr)
            return 2
        differing = stale(files(out), files(WIRE))
        if check and differing:
            print(f"generated code is stale, run scripts/generate_protos.py: {', '.join(differing)}", file=sys.stderr)
            return 1
        if not check:
            replace(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
