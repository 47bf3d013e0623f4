"""What a job can leave in its directory to hurt whoever cleans up after it, as root."""

from __future__ import annotations

import os

from tests.hostile.inside.base import attack


@attack
def deep(levels: str) -> str:
    for _ in range(int(levels)):
        os.mkdir("deep")
        os.chdir("deep")
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY))
    return f"{levels} levels"


@attack
def links_out(*targets: str) -> str:
    """Symbolic links to what is not ours, one of them where a directory was."""
    for number, target in enumerate(targets):
        os.symlink(target, f"link-{number}")
    os.mkdir("swapped")
    os.rename("swapped", "gone")
    os.symlink(targets[0], "swapped")
    return f"{len(targets)} links"


@attack
def hard_link(target: str, link: str = "hard") -> str:
    os.link(target, link)
    return "linked"


@attack
def zoo(count: str) -> str:
    """Names and kinds that a careless walk stumbles over, and many of them."""
    for name in (b"new\nline", b"\xff\xfe", b"-rf", b"x" * 255, b" "):
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    os.mkfifo("fifo")
    os.makedirs("closed/inner")
    os.mkdir("many")
    for number in range(int(count)):
        os.close(os.open(f"many/{number}", os.O_CREAT | os.O_WRONLY))
    os.close(os.open("shell", os.O_CREAT | os.O_WRONLY))
    os.chmod("shell", 0o6755)
    os.chmod("closed", 0)
    os.chmod(".", 0)
    return "done"
