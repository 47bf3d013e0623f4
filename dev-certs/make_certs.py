"""Throw-away certificates for development: a CA, a server's, an admin's and a viewer's. Never for production."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobrunner.errors import JobRunnerError
from jobrunner.server.devcerts import CLIENTS, HOSTS, make_certs


def main() -> None:
    """Read the arguments, write the files, and say in one line why if that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go; made if it is not there")
    parser.add_argument(
        "--client", action="append", default=[], metavar="NAME=OU", type=_client, help="one more client, with this role"
    )
    parser.add_argument("--host", action="append", default=[], metavar="NAME", help="one more name or address of the server")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    given = parser.parse_args()
    try:
        make_certs(given.out, {**CLIENTS, **dict(given.client)}, (*HOSTS, *given.host), force=given.force)
    except JobRunnerError as error:
        sys.exit(f"{error}; --force overwrites" if error.message.endswith("already") else str(error))


def _client(text: str) -> tuple[str, str]:
    name, equals, role = text.partition("=")
    if not (name and equals and role):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=OU")
    return name, role


if __name__ == "__main__":
    main()
