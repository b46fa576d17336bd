"""The flags of every command are those on record: names, types, defaults, help panels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import typer

from pla_serve.cli import app

RECORD = Path(__file__).parent / "command_line.json"


def type_name(hint: Any) -> str:
    """``int``, ``Path``, or choices such as ``auto|cpu``; of a list, what it is a list of."""
    choices = get_args(hint)
    if choices and all(isinstance(choice, str) for choice in choices):
        return "|".join(choices)
    (hint,) = choices or (hint,)
    return str(hint.__name__)


def flag(parameter: Any) -> dict[str, Any]:
    argument = parameter.param_type_name == "argument"
    default = parameter.default
    return {
        "names": [] if argument else sorted(parameter.opts),
        "off": sorted(parameter.secondary_opts),
        "argument": argument,
        "type": type_name(parameter.type_descriptor.annotation),
        "repeats": bool(parameter.multiple or parameter.nargs == -1),
        "default": default if isinstance(default, (int, float, str)) else None,
        "required": bool(parameter.required),
        "panel": parameter.rich_help_panel,
        "variable": parameter.envvar,
        "hidden": bool(parameter.hidden),
    }


def flags(command: Any, path: str = "") -> dict[str, list[dict[str, Any]]]:
    """The flags of every command below, by the command's words."""
    if not hasattr(command, "commands"):
        found = [flag(parameter) for parameter in command.params]
        return {path: sorted(found, key=lambda one: (not one["argument"], one["names"]))}
    return {
        name: of_it
        for word, below in command.commands.items()
        for name, of_it in flags(below, f"{path} {word}".strip()).items()
    }


def test_flags_are_those_on_record() -> None:
    assert flags(typer.main.get_command(app)) == json.loads(RECORD.read_text())
