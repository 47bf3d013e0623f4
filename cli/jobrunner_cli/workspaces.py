"""`jobrunner workspace`: the directories that are kept from one job to the next."""

from __future__ import annotations

from typing import Annotated

import typer

from jobrunner_cli.session import connected, say
from jobrunner_cli.typed import PlainCommand, PlainGroup

__all__ = ["app"]

app = typer.Typer(help="Directories that are kept from one of your jobs to the next.", cls=PlainGroup)


@app.command("ls", cls=PlainCommand)
def list_workspaces(
    ctx: typer.Context,
    all_users: Annotated[bool, typer.Option("--all", help="Everyone's, not only yours.")] = False,
) -> int:
    """List your workspaces: size, last use, and the job that has it."""
    from jobrunner_cli.show import workspaces

    say(workspaces(connected(ctx.obj, lambda client: client.workspaces(all_users=all_users))))
    return 0


@app.command("rm", cls=PlainCommand)
def remove(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The workspace.", show_default=False)],
    user: Annotated[str, typer.Option(metavar="USER", help="Whose, if it is not yours.")] = "",
) -> int:
    """Remove a workspace that no job has, with all that is in it."""
    connected(ctx.obj, lambda client: client.remove_workspace(name, user=user))
    return 0
