"""Holds the answers of a request to the format of its tool calls."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import msgspec

from pla_serve.server.api.params import MOST_CONSTRAINT
from pla_serve.server.errors import ApiError, invalid
from pla_serve.server.generation.generation import GenerationPlan
from pla_serve.server.tools.support import ToolSupport
from pla_serve.server.tools.tool import ANY_OBJECT, Schema, ToolUse
from pla_serve.wire.engine import Grammar

Check = Callable[[Grammar], Awaitable[None]]
"""Raises `ApiError` 400 for a grammar that cannot be used."""


async def with_tool_grammar(
    plan: GenerationPlan, use: ToolUse, tools: ToolSupport, check: Check
) -> GenerationPlan:
    """Return ``plan`` with the grammar of its tool calls, checked.

    Where a schema cannot be compiled and its function is not strict, its arguments may be any
    object. Where a call is not required and there is no grammar at all, the answer is left free.

    Raises:
        ApiError: 400, a constraint cannot be used, or contradicts the tools.
    """
    content = _content(plan.sampling[0].grammar, use)
    may_be_free = not use.must_call and not use.strict and content is None
    for loose in (False, True):
        grammar = _grammar(use, tools, content, loose)
        if grammar is None:
            break
        try:
            if len(grammar.spec) > MOST_CONSTRAINT:
                raise invalid(
                    f"the schemas of the tools may have {MOST_CONSTRAINT} characters together, "
                    f"not {len(grammar.spec)}",
                    "tools",
                )
            await check(grammar)
        except ApiError as error:
            if error.status != 400 or (loose and not may_be_free):
                raise
        else:
            sampling = [msgspec.structs.replace(each, grammar=grammar) for each in plan.sampling]
            return replace(plan, sampling=sampling)
    return plan


def _content(given: Grammar | None, use: ToolUse) -> Schema | None:
    """Return the schema of an answer without calls; None: the request names none."""
    if given is None:
        return None
    if use.must_call:
        raise invalid("an answer that has to be a tool call takes no other constraint", "tools")
    if given.kind == "json_object":
        return ANY_OBJECT
    if given.kind == "json_schema":
        found: Schema = json.loads(given.spec)
        return found
    raise invalid("beside tools only a JSON schema can constrain the answer", "tools")


def _grammar(
    use: ToolUse, tools: ToolSupport, content: Schema | None, loose: bool
) -> Grammar | None:
    try:
        spec = tools.grammar(use, content, loose=loose)
    except ValueError as error:
        raise invalid(str(error), "response_format") from None
    if spec is None:
        return None
    optional = not use.must_call and not use.strict and content is None
    return Grammar("lark", spec, optional)
