"""`jobrunner certs`: a CA in a directory. It asks no server, and loads `cryptography` only when it runs."""

from __future__ import annotations

import json as json_module
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobrunner.errors import CertificateError, InvalidRequest
from jobrunner_cli import submit
from jobrunner_cli.session import say, warn
from jobrunner_cli.typed import PlainCommand, PlainGroup

if TYPE_CHECKING:
    from jobrunner.pki import Described, Issued

__all__ = ["app"]

app = typer.Typer(
    help="Make, renew, revoke and show certificates: a CA in a directory.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    cls=PlainGroup,
)

ROLES = ("admin", "viewer", "server")
MAX_REQUEST = 65536
"""Bytes."""
Dir = Annotated[str, typer.Option("--dir", envvar="JOBRUNNER_CERTS", metavar="DIR", help="The CA's directory.")]
Days = Annotated[str | None, typer.Option(metavar="NUMBER", help="How long it holds.")]
Passphrase = Annotated[str, typer.Option("--passphrase-file", metavar="FILE", help="Its first line opens the CA's key.")]
KeyPassphrase = Annotated[str, typer.Option("--key-passphrase-file", metavar="FILE", help="Its first line encrypts the new key.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a key that is there.")]


@app.command(cls=PlainCommand)
def init(
    directory: Dir = "certs",
    name: Annotated[str, typer.Option(metavar="NAME", help="The CA's own name.")] = "",
    days: Days = None,
    passphrase_file: Passphrase = "",
) -> int:
    """Make a CA, and its empty revocation list. Ten years, unless told otherwise."""
    pki = _pki()
    authority = pki.Authority.create(Path(directory), name=name, passphrase=_passphrase(passphrase_file), **_days(days))
    say(f"made a CA in {directory}; it ends on {authority.certificate.not_valid_after_utc:%Y-%m-%d}")
    return 0


@app.command(cls=PlainCommand)
def issue(
    role: Annotated[str, typer.Argument(metavar="admin|viewer|server", show_default=False)],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The user, or the server's host name or address.", show_default=False)
    ],
    directory: Dir = "certs",
    host: Annotated[list[str], typer.Option(metavar="NAME", help="One more name or address of the server; repeatable.")] = [],  # noqa: B006
    csr: Annotated[str, typer.Option(metavar="FILE", help="Sign this request: the key stays where it was made.")] = "",
    days: Days = None,
    passphrase_file: Passphrase = "",
    key_passphrase_file: KeyPassphrase = "",
    force: Force = False,
) -> int:
    """Make a key and its certificate: NAME.key and NAME.pem. A server's holds 90 days, a client's 30.

    With --csr only NAME.pem: of the request its public key is taken, and nothing else.
    """
    if role not in ROLES:
        raise InvalidRequest("role", f"{role[:64]!r} is not one of {', '.join(ROLES)}", "issue certificate")
    if host and role != "server":
        raise InvalidRequest("host", "only a server has one", "issue certificate")
    if csr and key_passphrase_file:
        raise InvalidRequest("key-passphrase-file", "with --csr no key is made", "issue certificate")
    pki = _pki()
    profile = pki.Profile(name, hosts=(name, *host)) if role == "server" else pki.Profile(name, role)
    with pki.Authority.opened(Path(directory), _passphrase(passphrase_file)) as authority:
        if csr:
            _told(authority.sign(name, profile, _request(csr), force=force, **_days(days)))
        else:
            _told(authority.issue(name, profile, passphrase=_passphrase(key_passphrase_file), force=force, **_days(days)))
    return 0


@app.command(cls=PlainCommand)
def renew(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", show_default=False)] = None,
    directory: Dir = "certs",
    days: Days = None,
    passphrase_file: Passphrase = "",
    key_passphrase_file: KeyPassphrase = "",
) -> int:
    """Make new keys and certificates that say the same. Without names: of all that are past two thirds of their life.

    Where the key is not here (--csr) the new certificate is for the same key.

    The revocation list is signed anew in any case, for 30 days: a daily run keeps everything valid. What was renewed
    holds until its own end.
    """
    pki = _pki()
    with pki.Authority.opened(Path(directory), _passphrase(passphrase_file)) as authority:
        failed: list[CertificateError] = []
        for name in names or authority.due():
            try:
                _told(authority.renew(name, passphrase=_passphrase(key_passphrase_file), **_days(days)))
            except CertificateError as exc:  # the others, and the list, do not suffer from it
                failed.append(exc)
        authority.sign_revoked(authority.revoked())
        for error in failed[:-1]:
            warn(error.message)
        if failed:
            raise failed[-1]
    return 0


@app.command(cls=PlainCommand)
def revoke(
    names: Annotated[list[str], typer.Argument(metavar="NAME|SERIAL...", show_default=False)],
    directory: Dir = "certs",
    passphrase_file: Passphrase = "",
) -> int:
    """Revoke a name's certificates that still hold. With a serial number, that one. Bring crl.pem to the server then."""
    pki = _pki()
    with pki.Authority.opened(Path(directory), _passphrase(passphrase_file)) as authority:
        for name in names:
            for serial in authority.revoke(name):
                say(f"revoked {serial:x} of {name}")
    return 0


@app.command(cls=PlainCommand)
def show(
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", show_default=False)] = None,
    directory: Dir = "certs",
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> int:
    """Tell what certificates say and how long they hold. And what is wrong or weak; of a CA's directory or of any files."""
    pki = _pki()
    revoked, warnings = ([], []) if files else _list_of(Path(directory))
    paths = [Path(file) for file in files or []] or sorted(path for path in Path(directory).glob("*.pem") if path.name != "crl.pem")
    if not paths:
        raise CertificateError(f"show {directory}", "there are no certificates; `jobrunner certs init` makes a CA")
    found = [each for path in paths for each in pki.describe(path, revoked)]
    if json:
        say(json_module.dumps([_as_json(each) for each in found], indent=2))
        return 0
    for each in found:
        names = f" ({', '.join(each.hosts)})" if each.hosts else ""
        say(f"{each.path}: {each.kind} {each.user}{names}, until {each.not_after:%Y-%m-%d %H:%M} UTC, serial {each.serial}")
        for warning in each.warnings:
            say(f"  warning: {warning}")
    for warning in warnings:
        say(f"  warning: {warning}")
    return 0


def _pki() -> Any:
    try:
        import jobrunner.pki
    except ImportError as exc:
        raise CertificateError("work with certificates", f"{exc}; pip install 'jobrunner[cli]'") from exc
    return jobrunner.pki


def _passphrase(file: str) -> bytes | None:
    from jobrunner.pki.store import read_passphrase

    return read_passphrase(Path(file)) if file else None


def _request(file: str) -> bytes:
    try:
        with Path(file).open("rb") as opened:
            data = opened.read(MAX_REQUEST + 1)
    except (OSError, ValueError) as exc:
        raise CertificateError(f"read request {file}", getattr(exc, "strerror", None) or str(exc)) from exc
    if len(data) > MAX_REQUEST:
        raise CertificateError(f"read request {file}", f"it is longer than {MAX_REQUEST} bytes")
    return data


def _days(text: str | None) -> dict[str, int]:
    number = submit.count("days", text, "issue certificate")
    if number is not None and not 0 < number <= 36500:
        raise InvalidRequest("days", f"{number} is not between 1 and 36500", "issue certificate")
    return {} if number is None else {"days": number}


def _told(issued: Issued) -> None:
    files = f"{issued.cert} {issued.key}" if issued.key else str(issued.cert)
    say(f"{files}: until {issued.certificate.not_valid_after_utc:%Y-%m-%d}")


def _list_of(directory: Path) -> tuple[list[int], list[str]]:
    """The serial numbers that a CA's directory has as revoked, and what is to be said of the list itself."""
    from cryptography import x509

    try:
        held = x509.load_pem_x509_crl((directory / "crl.pem").read_bytes())
    except OSError:
        return [], ["there is no revocation list: `jobrunner certs renew` makes one"]
    except ValueError:
        return [], ["crl.pem holds no revocation list in PEM form, and servers refuse to use it"]
    left = (held.next_update_utc or datetime.now(UTC)) - datetime.now(UTC)
    warnings = []
    if left.total_seconds() <= 0:
        warnings.append("crl.pem has expired, and servers with it refuse everyone: `jobrunner certs renew`")
    elif left.days < 10:
        warnings.append(f"crl.pem expires in {left.days} days, and servers with it refuse everyone then: `jobrunner certs renew`")
    return [entry.serial_number for entry in held], warnings


def _as_json(each: Described) -> dict[str, object]:
    return {
        "path": each.path,
        "kind": each.kind,
        "user": each.user,
        "hosts": list(each.hosts),
        "serial": each.serial,
        "not_before": each.not_before.isoformat(),
        "not_after": each.not_after.isoformat(),
        "warnings": list(each.warnings),
    }
