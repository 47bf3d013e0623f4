"""The commands. Each makes a request of its options, asks the server, prints the answer and returns its exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobrunner import __version__
from jobrunner.job import JobStatus, Stream
from jobrunner.output import Selection
from jobrunner_cli import certs, submit, workspaces
from jobrunner_cli.exitcodes import USAGE, job_exit_code
from jobrunner_cli.session import Settings, connected, say, warn
from jobrunner_cli.typed import PlainCommand, PlainGroup

if TYPE_CHECKING:
    from jobrunner.client import JobClient

__all__ = ["app"]

app = typer.Typer(
    name="jobrunner",
    help="Run commands as isolated, limited jobs on another host.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    cls=PlainGroup,
)
app.add_typer(certs.app, name="certs")
app.add_typer(workspaces.app, name="workspace")
# A job's own options are not ours: ours end at the first word of its command.
_OPTIONS_FIRST = {"allow_interspersed_args": False}

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, 12 hexadecimal characters.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def _version(asked: bool) -> None:
    if asked:
        say(f"jobrunner {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    ctx: typer.Context,
    address: Annotated[str, typer.Option(envvar="JOBRUNNER_ADDRESS", metavar="HOST:PORT", help="The server.")] = "",
    ca: Annotated[str, typer.Option(envvar="JOBRUNNER_CA", metavar="FILE", help="The CA of the server's certificate.")] = "",
    cert: Annotated[str, typer.Option(envvar="JOBRUNNER_CERT", metavar="FILE", help="Your certificate.")] = "",
    key: Annotated[str, typer.Option(envvar="JOBRUNNER_KEY", metavar="FILE", help="Your certificate's key.")] = "",
    key_passphrase_file: Annotated[
        str, typer.Option(envvar="JOBRUNNER_KEY_PASSPHRASE_FILE", metavar="FILE", help="Its first line opens the key.")
    ] = "",
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(USAGE)
    ctx.obj = Settings(address, ca, cert, key, key_passphrase_file)


def start_or_run(
    ctx: typer.Context,
    command: submit.Command,
    name: submit.Name = "",
    env: submit.Env = [],  # noqa: B006 - typer's way to say that it may be given many times
    env_file: submit.EnvFile = [],  # noqa: B006
    cwd: submit.Cwd = "",
    network: submit.Network = "none",
    root: submit.Root = "",
    writable: submit.Writable = False,
    user: submit.User = "",
    volume: submit.Volume = [],  # noqa: B006
    workspace: submit.Workspace = "",
    cpus: submit.Cpus = None,
    memory: submit.Memory = None,
    pids: submit.Pids = None,
    read_bps: submit.ReadBps = None,
    write_bps: submit.WriteBps = None,
    read_iops: submit.ReadIops = None,
    write_iops: submit.WriteIops = None,
    open_files: submit.OpenFiles = None,
    tmp_size: submit.TmpSize = None,
    work_size: submit.WorkSize = None,
    timeout: submit.Timeout = None,
    idle_timeout: submit.IdleTimeout = None,
    output_limit: submit.OutputLimit = None,
    output_policy: submit.OutputPolicy = None,
    stop_signal: submit.StopSignal = "TERM",
    grace: submit.Grace = None,
    merge: submit.Merge = False,
    label: submit.Label = [],  # noqa: B006
    request_id: submit.RequestId = "",
) -> int:
    limits = submit.limits(
        cpus=cpus,
        memory=memory,
        pids=pids,
        read_bps=read_bps,
        write_bps=write_bps,
        read_iops=read_iops,
        write_iops=write_iops,
        open_files=open_files,
        tmp_size=tmp_size,
        work_size=work_size,
        timeout=timeout,
        idle_timeout=idle_timeout,
        output_limit=output_limit,
        output_policy=output_policy,
    )
    spec = submit.spec(
        command,
        env,
        env_file,
        label,
        grace,
        limits,
        name,
        cwd=cwd,
        network=network,
        root=root,
        writable=writable,
        user=user,
        volumes=volume,
        workspace=workspace,
        stop_signal=stop_signal,
        merge=merge,
        request_id=request_id,
    )
    if ctx.command.name == "run":
        from jobrunner_cli.follow import run_job

        return connected(ctx.obj, lambda client: run_job(client, spec))
    job = connected(ctx.obj, lambda client: client.start(spec))
    say(f"Started job with ID: {job.job_id}")
    return 0


_START = "Start a job and print its id."
_RUN = "Start a job, show its output, and exit with its code. Ctrl-C stops it."
app.command("start", cls=PlainCommand, context_settings=_OPTIONS_FIRST, help=_START)(start_or_run)
app.command("run", cls=PlainCommand, context_settings=_OPTIONS_FIRST, help=_RUN)(start_or_run)


@app.command(cls=PlainCommand)
def stop(
    ctx: typer.Context,
    job_id: JobId,
    grace: Annotated[str | None, typer.Option(metavar="DURATION", help="Time between the stop signal and the kill.")] = None,
) -> int:
    """Stop a job; returns when it is gone."""
    seconds = submit.duration("grace", grace, "stop job")
    _, message = connected(ctx.obj, lambda client: client.get(job_id).stop_told(seconds))
    if "already" in message:
        warn(f"{message[:1].lower()}{message[1:]}")
    return 0


@app.command(cls=PlainCommand)
def status(ctx: typer.Context, job_id: JobId) -> int:
    """Print one word: running, completed, failed or terminated."""
    say(connected(ctx.obj, lambda client: client.get(job_id).status()))
    return 0


@app.command(cls=PlainCommand)
def log(
    ctx: typer.Context,
    job_id: JobId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the job ends.")] = False,
    tail: Annotated[str | None, typer.Option(metavar="N", help="Only the last N lines of what is there.")] = None,
    since: Annotated[str | None, typer.Option(metavar="WHEN", help="From this time on: 10m (ago), or 2026-01-31T12:00:00.")] = None,
    until: Annotated[str | None, typer.Option(metavar="WHEN", help="Up to this time.")] = None,
    timestamps: Annotated[bool, typer.Option("-t", "--timestamps", help="Each line with the time it was written.")] = False,
    offset: Annotated[str, typer.Option(metavar="BYTE", help="Start at this byte of the output.")] = "0",
    stream: Annotated[str, typer.Option(metavar="stdout|stderr", help="Only this stream.")] = "",
) -> int:
    """Show a job's output, byte for byte.

    Its stdout goes to stdout, its stderr to stderr.
    """
    selection = Selection(
        offset=submit.offset(offset),
        follow=follow,
        streams=frozenset(submit.words("stream", Stream, [stream] if stream else [], "read log")),
        tail=submit.count("tail", tail, "read log"),
        since=submit.moment("since", since, "read log"),
        until=submit.moment("until", until, "read log"),
        exact_times=timestamps,
    )

    async def copy(client: JobClient) -> None:
        from jobrunner_cli.follow import copy_output
        from jobrunner_cli.stamp import Stamper

        await copy_output(client.get(job_id).read(selection), Stamper() if timestamps else None)

    connected(ctx.obj, copy)
    return 0


@app.command(cls=PlainCommand)
def wait(ctx: typer.Context, job_id: JobId) -> int:
    """Wait until a job has ended, print how, and exit with its code."""
    from jobrunner_cli.show import ending, hint

    info = connected(ctx.obj, lambda client: client.get(job_id).wait())
    say(ending(info))
    if text := hint(info):
        warn(text)
    return job_exit_code(info)


@app.command(cls=PlainCommand)
def info(ctx: typer.Context, job_id: JobId, json: Json = False) -> int:
    """Print everything known of a job."""
    from jobrunner_cli.show import as_json, details

    known = connected(ctx.obj, lambda client: client.get(job_id).info())
    say(as_json(known) if json else details(known))
    return 0


@app.command(cls=PlainCommand)
def explain(ctx: typer.Context, job_id: JobId) -> int:
    """Tell why a job ended as it did, and what to do about it. And which limits it met."""
    from jobrunner_cli.explain import explain

    say(explain(connected(ctx.obj, lambda client: client.get(job_id).info())))
    return 0


@app.command("ls", cls=PlainCommand)
def list_jobs(
    ctx: typer.Context,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only ids.")] = False,
    status: Annotated[list[str], typer.Option(metavar="STATUS", help="Only jobs of this status; repeatable.")] = [],  # noqa: B006
    label: Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="Only jobs with this label; repeatable.")] = [],  # noqa: B006
    name: Annotated[str, typer.Option("-n", "--name", metavar="NAME", help="Only jobs of this name.")] = "",
) -> int:
    """List jobs, newest first."""
    from jobrunner_cli.show import as_json, table

    statuses = submit.words("status", JobStatus, status, "list jobs")
    labels = submit.pairs("label", label, "list jobs")
    jobs = connected(ctx.obj, lambda client: client.list(statuses=statuses, labels=labels, name=name))
    if quiet:
        for job in jobs:
            say(job.job_id)
    else:
        say(as_json(jobs) if json else table(jobs))
    return 0


@app.command("rm", cls=PlainCommand)
def remove(ctx: typer.Context, job_id: JobId) -> int:
    """Remove the record and the output of a job that has ended."""
    connected(ctx.obj, lambda client: client.remove(job_id))
    return 0
