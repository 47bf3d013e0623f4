"""Beside the virtual machine of power.sh: boots it, kills its emulator at a random moment of its work, and boots it again.

Usage: python -m tests.vm.power_host WORK-DIRECTORY QEMU-COMMAND... The last boot only looks. JOBRUNNER_VM_KILLS is how often (2).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

KILLS = int(os.environ.get("JOBRUNNER_VM_KILLS", "2"))
LONGEST = 300.0
"""Seconds that a boot and its look at the disk may take."""
ENOUGH = 6
"""Lines that the guest has told of its work before it may be killed."""


def lines_of(result: Path) -> list[str]:
    """Whole lines of what the guest has told since this boot."""
    text = result.read_bytes().decode(errors="replace") if result.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def wait_for(machine: subprocess.Popen[bytes], result: Path, count: int) -> None:
    """Until the guest has told that all was right, and so many lines of its work; SystemExit if it does not."""
    deadline = time.monotonic() + LONGEST
    while not (lines := lines_of(result)) or not lines[0].startswith("right ") or len(lines) <= count:
        if machine.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the virtual machine did not get that far; it told: {lines}")
        time.sleep(0.05)


def main() -> None:
    work, command = Path(sys.argv[1]), sys.argv[2:]
    choice = random.Random(os.environ.get("JOBRUNNER_CRASH_SEED"))
    told: list[str] = []
    for number in range(KILLS + 1):
        (work / "result").unlink(missing_ok=True)
        begun = time.monotonic()
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as machine:
            try:
                wait_for(machine, work / "result", ENOUGH if number < KILLS else 0)
                if number < KILLS:
                    time.sleep(choice.uniform(0, 4))
            finally:
                machine.kill()  # SIGKILL: what the guest has not written is lost
        right, *new = lines_of(work / "result")
        told += new
        (work / "told").write_bytes("".join(f"{line}\n" for line in told).encode().ljust(1 << 20, b"\0"))
        print(f"\npower failed, {number + 1}: {right}; then told {len(new)} lines; {time.monotonic() - begun:.0f} s", flush=True)
    words = [line.split()[0] for line in told]
    assert {"started", "ended", "stopped", "removed"} <= set(words), words


if __name__ == "__main__":
    main()
