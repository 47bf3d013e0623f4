"""`jobrunnerd`: the server's command.

Exit codes: 0 done, of a server after a shutdown that was asked for; 1 a bug; 2 wrong usage or settings; 3 the host lacks something
or the address is taken; 74 standard output cannot be written, 141 nobody reads it any more; 130 interrupted; 128 + n when a second
signal n cut a shutdown short. What fails is one line on standard error that begins with `jobrunnerd: `.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer

from jobrunner import checked
from jobrunner.config import RunnerConfig
from jobrunner.errors import ConfigError, InternalError, JobRunnerError
from jobrunner.linux.finding import Level
from jobrunner.runner import JobRunner
from jobrunner.server import control, hostcheck, process
from jobrunner.server import dev as development
from jobrunner.settings import load, load_runner
from jobrunner.stdio import PIPE_CLOSED, STDERR, STDOUT, OutputClosed, OutputFailed, Unbuffered, fill_descriptors

__all__ = ["app", "main", "run"]

EXIT_BUG, EXIT_USAGE, EXIT_HOST, EXIT_OUTPUT, EXIT_INTERRUPTED = 1, 2, 3, 74, 130
app = typer.Typer(
    help="The server of jobrunner, a remote job executor.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


Config = Annotated[str | None, typer.Option(metavar="FILE", help="Settings in TOML.", envvar="JOBRUNNERD_CONFIG")]
StateDirectory = Annotated[str | None, typer.Option(metavar="DIRECTORY", help="Where jobs and their output are kept.")]
# Texts, as in the settings file, not typer's paths: an empty text, of a variable that is not set for instance, would be ".".


def _given(name: str, text: str, read: Callable[[object], Any] = checked.path) -> Any:
    """The value of an option. ConfigError names it."""
    try:
        return read(text)
    except ValueError as exc:
        raise ConfigError("the command line", f"{name}: {exc}") from exc


def _settings(config: str | None) -> Path | None:
    return None if config is None else _given("config", config)


@app.callback(invoke_without_command=True)
def _commands(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help(), file=sys.stderr)
        raise typer.Exit(EXIT_USAGE)


@app.command()
def serve(
    config: Config = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Port 0 is any free one.")] = None,
    state_dir: StateDirectory = None,
    ca: Annotated[str | None, typer.Option(metavar="FILE", help="The CA that clients' certificates are from, PEM.")] = None,
    cert: Annotated[str | None, typer.Option(metavar="FILE", help="The server's certificate, PEM.")] = None,
    key: Annotated[str | None, typer.Option(metavar="FILE", help="Its private key, PEM.")] = None,
    key_passphrase_file: Annotated[str | None, typer.Option(metavar="FILE", help="Its first line opens the key.")] = None,
    crl: Annotated[str | None, typer.Option(metavar="FILE", help="The CA's revocation list, PEM.")] = None,
) -> None:
    """Serve jobs over mutual TLS until SIGTERM or SIGINT. Jobs run on without the server, unless `on_shutdown` is `stop`.

    A second signal leaves at once. SIGHUP reads the certificates again; they are also read when they change.

    Each option is also a variable, JOBRUNNERD_LISTEN for instance, and a key of the settings file.
    """
    overrides = {"listen": listen, "state_dir": state_dir, "ca": ca, "cert": cert, "key": key}
    overrides |= {"key_passphrase_file": key_passphrase_file, "crl": crl}
    with _told():
        process.serve(load(_settings(config), os.environ, overrides), ready=_tell_address)


@app.command()
def check(
    config: Config = None,
    state_dir: StateDirectory = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects: level, name, what, remedy.")] = False,
) -> None:
    """Tell what this host offers jobs, and what it lacks.

    Leaves nothing behind. A line for each thing: ok, limited (jobs run, something is not held) or missing, with the remedy.
    Where nothing is missing, jobs are run in the end with all their protections, one for each root and volume that the settings
    offer. Exit code 3 if anything is missing, 2 if the settings cannot be read.
    """
    with _told():
        findings = hostcheck.findings(_settings(config), state_dir)
        print(json.dumps([asdict(finding) for finding in findings], indent=2) if as_json else "\n".join(map(str, findings)))
    if any(finding.level is Level.MISSING for finding in findings):
        raise typer.Exit(EXIT_HOST)


@app.command()
def stop_jobs(
    config: Config = None,
    state_dir: StateDirectory = None,
    grace: Annotated[str, typer.Option(metavar="DURATION", help="For all jobs; each has its own grace period at most.")] = "5s",
) -> None:
    """Stop all jobs that run on while no server does.

    As when the host shuts down: they are told as `shutdown`. Exit code 3 while a server holds the state directory: stop that first.
    """

    async def stop(settings: RunnerConfig) -> None:
        async with JobRunner.open(settings, wait=False) as runner:
            await runner.stop_all(grace=seconds, by="jobrunnerd")

    with _told():
        seconds = _given("grace", grace, checked.between(checked.seconds, 0, 86400))
        settings = load_runner(_settings(config), os.environ, {"state_dir": state_dir})
        if not settings.state_dir.is_dir():
            # Told, and no failure: the units stop the jobs of a server that was never started, too.
            print(f"jobrunnerd: there is no state directory {settings.state_dir}, so no jobs", file=sys.stderr)
            return
        anyio.run(stop, settings)


@app.command()
def drain(
    config: Config = None,
    state_dir: StateDirectory = None,
) -> None:
    """Let the server take no new jobs, and leave after its last.

    Returns when it has left. Everything else is served meanwhile. Interrupting this command does not take it back; a server that is
    started anew takes jobs. Exit code 3 if no server holds the state directory, or if it has left before its last job had ended.
    """
    with _told():
        control.drain(
            load_runner(_settings(config), os.environ, {"state_dir": state_dir}).state_dir, lambda text: print(text, flush=True)
        )


@app.command()
def dev(
    directory: Annotated[
        str | None, typer.Option("--dir", metavar="DIRECTORY", help="For certificates and jobs; a new one in /tmp if not given.")
    ] = None,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Port 0 is any free one.")] = "127.0.0.1:7443",
) -> None:
    """Serve with throw-away certificates, to try it out.

    Prints what a client needs: one line to paste for each role. Under sudo the clients' keys are the calling user's.
    """
    with _told():
        _given("listen", listen, checked.listen)
        development.serve(None if directory is None else _given("dir", directory), listen, ready=_tell_address)


def main() -> None:
    """The console script."""
    fill_descriptors()
    sys.stdout, sys.stderr = Unbuffered(STDOUT), Unbuffered(STDERR)
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code. What is no error of ours and none of the command line is a bug, and raised."""
    try:
        code = app(args, prog_name="jobrunnerd", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.TyperException as exc:
        where = getattr(getattr(exc, "ctx", None), "command_path", "jobrunnerd")
        print(f"jobrunnerd: {exc.format_message().rstrip('.')} (see `{where} --help`)", file=sys.stderr)
        return EXIT_USAGE
    except OutputFailed as exc:
        print(f"jobrunnerd: {exc.message}", file=sys.stderr)
        return EXIT_OUTPUT
    except OutputClosed:
        return PIPE_CLOSED
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED


def _tell_address(address: str) -> None:
    print(f"listening on {address}", file=sys.stderr, flush=True)


@contextmanager
def _told() -> Iterator[None]:
    """An error of ours is one line and an exit code, never a traceback."""
    try:
        yield
    except OutputFailed:
        raise
    except JobRunnerError as exc:
        print(f"jobrunnerd: {exc.message}", file=sys.stderr)
        code = EXIT_USAGE if isinstance(exc, ConfigError) else EXIT_BUG if isinstance(exc, InternalError) else EXIT_HOST
        raise typer.Exit(code) from exc


if __name__ == "__main__":
    main()
