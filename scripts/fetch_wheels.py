"""Downloads what the package needs to be built and to run, as wheels, in the versions and with the hashes of requirements.lock.

`fetch_wheels.py DIR` is for image builds: DIR then serves `pip install --no-index --find-links DIR`. pip cannot do it alone: it
checks hashes only of a list that is complete, and the lock also holds what developers need, most of it.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Download, then leave with one line if a file is not what the lock says."""
    wheels = Path(sys.argv[1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"], *(extras["server"] + extras["cli"])]
    lock = (ROOT / "requirements.lock").read_text()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as versions:
        versions.write(re.sub(r" \\\n +--hash=\S+", "", lock))
        versions.flush()
        download = ["download", "--no-cache-dir", "--quiet", "--only-binary", ":all:", "--constraint", versions.name, "--dest"]
        done = subprocess.run([sys.executable, "-m", "pip", *download, str(wheels), *wanted], check=False)
    if done.returncode:
        sys.exit(f"cannot download dependencies: pip ended with exit code {done.returncode}")
    for wheel in sorted(wheels.iterdir()):
        if f"sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}" not in lock:
            sys.exit(f"cannot use {wheel.name}: its hash is not in requirements.lock")


if __name__ == "__main__":
    main()
