"""`python deny.py CALL=ERRNO[,CALL=ERRNO] COMMAND...`: a command behind a filter of system calls, as of a container's runtime."""

from __future__ import annotations

import errno
import os
import sys

import pyseccomp


def main() -> None:
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for word in sys.argv[1].split(","):
        call, _, error = word.partition("=")
        rules.add_rule(pyseccomp.ERRNO(getattr(errno, error)), call)
    rules.load()
    os.execvp(sys.argv[2], sys.argv[2:])


main()
