"""Holds the answers of a request to the format of its tool calls, and lets reasoning come first."""

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
from pla_serve.wire.engine import FreeThought, Grammar

Check = Callable[[Grammar], Awaitable[None]]
"""Raises `ApiError` 400 for a grammar that cannot be used."""


FREE = Grammar("lark", "start: /(.|\\n)*/\n", optional=True)
"""Any text: what follows reasoning whose length is bounded."""


def with_thought(
    plan: GenerationPlan, tools: ToolSupport, thought: FreeThought | None
) -> GenerationPlan:
    """Return the ``plan`` of an answer without calls, whose grammar begins after the reasoning."""
    grammar = plan.sampling[0].grammar
    schema = None if grammar is None else _schema(grammar)
    if schema is not None and (spec := tools.answer_grammar(schema)) is not None:
        return _constrained(plan, Grammar("lark", spec))
    if thought is None or (grammar is None and not thought.most_tokens):
        return plan
    return _constrained(plan, msgspec.structs.replace(grammar or FREE, thought=thought))


async def with_tool_grammar(
    plan: GenerationPlan,
    use: ToolUse,
    tools: ToolSupport,
    check: Check,
    thought: FreeThought | None = None,
) -> GenerationPlan:
    """Return ``plan`` with the grammar of its tool calls, checked.

    Free text up to a call may be reasoning as well. Where an answer begins with the call or with
    constrained content, ``thought`` comes before that.

    Where a schema cannot be compiled and its function is not strict, its arguments may be any
    object. Where a call is not required and there is no grammar at all, the answer is left free.

    Raises:
        ApiError: 400, a constraint cannot be used, or contradicts the tools.
    """
    content = _content(plan.sampling[0].grammar, use)
    may_be_free = not use.must_call and not use.strict and content is None
    if not (use.must_call or content is not None or tools.calls_at_start):
        thought = thought if thought is not None and thought.most_tokens else None
    for loose in (False, True):
        grammar = _grammar(use, tools, content, loose)
        if grammar is None:
            break
        grammar = msgspec.structs.replace(grammar, thought=thought)
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
            return _constrained(plan, grammar)
    return plan if thought is None else with_thought(plan, tools, thought)


def _constrained(plan: GenerationPlan, grammar: Grammar) -> GenerationPlan:
    sampling = [msgspec.structs.replace(each, grammar=grammar) for each in plan.sampling]
    return replace(plan, sampling=sampling)


def _content(given: Grammar | None, use: ToolUse) -> Schema | None:
    """Return the schema of an answer without calls; None: the request names none."""
    if given is None:
        return None
    if use.must_call:
        raise invalid("an answer that has to be a tool call takes no other constraint", "tools")
    schema = _schema(given)
    if schema is None:
        raise invalid("beside tools only a JSON schema can constrain the answer", "tools")
    return schema


def _schema(given: Grammar) -> Schema | None:
    """Return the JSON schema that a grammar stands for; None for those of other kinds."""
    if given.kind == "json_object":
        return ANY_OBJECT
    if given.kind == "json_schema":
        found: Schema = json.loads(given.spec)
        return found
    return None


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
