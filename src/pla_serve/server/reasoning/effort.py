"""Variables with which a request tells a chat template how much the model is to reason."""

from __future__ import annotations

import re

from pla_serve.server.reasoning.formats import HARMONY

SWITCHES = ("enable_thinking", "thinking")
"""Variables with which templates turn reasoning on and off."""
EFFORTS_OF_HARMONY = {"minimal": "low", "xhigh": "high", "max": "high"}
"""gpt-oss knows low, medium and high."""


def effort_variables(template: str, effort: str | None) -> dict[str, str | bool]:
    """Return the variables of ``template`` that ``effort`` sets; none for templates without any.

    >>> effort_variables("{% if enable_thinking %}<think>{% endif %}", "none")
    {'enable_thinking': False}
    """
    if effort is None:
        return {}
    found: dict[str, str | bool] = dict(thinking_variables(template, on=effort != "none"))
    if has_variable(template, "reasoning_effort"):
        known = EFFORTS_OF_HARMONY if HARMONY.fits(template) else {}
        found["reasoning_effort"] = known.get(effort, effort)
    return found


def thinking_variables(template: str, *, on: bool) -> dict[str, bool]:
    """Return the variables of ``template`` that turn reasoning on or off."""
    return {name: on for name in SWITCHES if has_variable(template, name)}


def has_variable(template: str, name: str) -> bool:
    """Whether ``template`` uses a variable called ``name``.

    >>> has_variable("{% if thinking %}{% endif %}", "thinking")
    True
    >>> has_variable("{{ message.thinking }}", "thinking")
    False
    """
    return re.search(rf"(?<![.\w'\"]){name}(?![\w'\"])", template) is not None
