"""Typer's commands without its conversion of values.

Every parameter of ours is a text, a list of texts or a flag: what typer gets from the command line is what the command takes, and
bad values are told by the code that knows them, in this project's words. Typer would still import pydantic to make a text a text,
which takes a third of the time of `jobrunner status`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["PlainCommand", "PlainGroup"]


class _AsTyped:
    """What typer asks to convert a parameter's value, in the place of its own."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        return list(value or ()) if param.multiple or param.nargs == -1 else value


class PlainCommand(TyperCommand):
    """A command whose parameters are taken as they were typed."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _as_typed(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """A group likewise."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _as_typed(super().get_params(ctx))


def _no_type(ctx: object) -> str:
    return ""


def _as_typed(params: list[Any]) -> list[Any]:
    # Private to typer. Where a version of typer has no such attributes this changes nothing: its own conversion gives the same, and
    # help has the types of arguments in it.
    for param in params:
        param._runtime_param = _AsTyped()
        if param.param_type_name == "argument":
            param._usage_display_name = partial(str, param.metavar)
            param.display_type_rich = _no_type
    return params
