"""A stand-in for a model: it says one thing after another, however it is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence


def call(name: str, **arguments: object) -> str:
    """A call of a tool, as Hermes and Qwen write it."""
    text = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{text}\n</tool_call>"


def script(answers: Sequence[str], without_tools: str) -> str:
    """Return a chat template that writes the next of ``answers``, for an engine that echoes it.

    Each result of a tool moves it on by one. Requests that offer no tools are told
    ``without_tools``: agents ask for titles and the like on the side.
    """
    lines = ["{%- set turn = messages | selectattr('role', 'equalto', 'tool') | list | length -%}"]
    lines.append(f"{{%- if not tools -%}}{_literal(without_tools)}")
    for place, answer in enumerate(answers):
        lines.append(f"{{%- elif turn == {place} -%}}{_literal(answer)}")
    return "".join([*lines, "{%- endif -%}"])


def _literal(text: str) -> str:
    return "{{ " + json.dumps(text) + " }}"
