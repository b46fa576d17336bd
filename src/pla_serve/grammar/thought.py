"""Grammars of outputs that begin with reasoning, in llguidance's Lark."""

from __future__ import annotations

import json
import re
from typing import Any

from pla_serve.wire.engine import FreeThought, Grammar

WHITESPACE = r"[ \n\t\r]{0,64}"
"""White space that is allowed between parts of JSON. Without a bound, a small model may write
blanks until its last token."""
ANSWER = "answer_after_reasoning"
"""Rule of what comes after the reasoning."""
_START = re.compile(r'"(?:[^"\\\n]|\\.)*+"|/(?:[^/\\\n]|\\.)++/|//[^\n]*|\bstart\b')
"""The rule ``start``, and whatever may hide that word: strings, expressions and comments."""
_SLASH = re.compile(r"\\.|/|\n", re.DOTALL)


def after_thought(grammar: Grammar) -> str:
    """Return the Lark grammar of free reasoning and then what ``grammar`` constrains.

    Up to two line breaks may stand between the reasoning and the rest.

    Example:

        thought = FreeThought("</think>")
        after_thought(Grammar("regex", "yes|no", thought=thought))
    """
    thought = grammar.thought
    assert thought is not None
    lines = [
        *_thought_rules(thought),
        _answer(grammar),
        r"REASONING_TEXT: /(.|\n)*/",
        r"REASONING_BREAK: /\n{0,2}/",
    ]
    return "\n".join(lines) + "\n"


def _thought_rules(thought: FreeThought) -> list[str]:
    """Return the rule ``start``, and those of the reasoning."""
    inner = "reasoning_before_answer"
    if thought.closing_token is None:
        rules = [f"{inner}[lazy]: REASONING_TEXT {json.dumps(thought.closing)}"]
    else:
        bound = f"[max_tokens={thought.most_tokens}]" if thought.most_tokens else ""
        rules = [
            f"{inner}: reasoning_text <[{thought.closing_token}]>",
            f"reasoning_text{bound}: REASONING_TEXT",
        ]
    if not thought.opening:
        return [f"start: {inner} REASONING_BREAK {ANSWER}", *rules]
    opening = json.dumps(thought.opening)
    if thought.opening_token is not None:
        opening = f"<[{thought.opening_token}]>"
    return [f"start: ({opening} {inner} REASONING_BREAK)? {ANSWER}", *rules]


def _answer(grammar: Grammar) -> str:
    """Return the rules of the answer."""
    match grammar.kind:
        case "json_object":
            return f"{ANSWER}: {_json({'type': 'object'})}"
        case "json_schema":
            return f"{ANSWER}: {_json(json.loads(grammar.spec))}"
        case "regex":
            return f"{ANSWER}: /{_SLASH.sub(_escape, grammar.spec)}/"
        case "lark":
            lines = grammar.spec.splitlines()
            rules = [line for line in lines if not line.startswith("%llguidance")]
            return _START.sub(_rename, "\n".join(rules))


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})


def _escape(found: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n"}.get(found[0], found[0])


def _rename(found: re.Match[str]) -> str:
    return ANSWER if found[0] == "start" else found[0]
