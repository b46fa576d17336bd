"""Bounds on a grammar's text that hold before any library sees it. Linear in its length."""

from __future__ import annotations

import re

from pla_serve.grammar.ascii_classes import with_ascii_classes
from pla_serve.grammar.errors import GrammarError
from pla_serve.grammar.limits import GrammarLimits
from pla_serve.wire.engine import Grammar

_JSON_PARTS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)
_REGEX_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]|[()]", re.DOTALL)
_LARK_PARTS = re.compile(
    r'"(?:[^"\\\n]|\\.)*+"|/(?:[^/\\\n]|\\.)++/|//[^\n]*|[\[\](){}]', re.DOTALL
)
_LARK_DEFINITION = re.compile(r"^[ \t]*[?!]?[A-Za-z_]\w*(?:\.-?\d+)?(?:\[[^\]\n]*\])?[ \t]*:", re.M)
_REFERENCE = re.compile(r'"\$(?:ref|dynamicRef)"')


def check_size(grammar: Grammar, limits: GrammarLimits) -> None:
    """Raises:
    GrammarError: the grammar is longer than may be sent to a worker.
    """
    length = len(grammar.spec)
    if length > limits.characters:
        raise GrammarError(
            f"the grammar has {length} characters; at most {limits.characters} are accepted"
        )
    if "\0" in grammar.spec:
        raise GrammarError("the grammar holds a NUL character")


def check_structure(grammar: Grammar, limits: GrammarLimits) -> None:
    """Raises:
    GrammarError: the grammar is nested too deeply or has too many definitions.
    """
    check_size(grammar, limits)
    spec = grammar.spec
    match grammar.kind:
        case "json_schema":
            _check_nesting("schema", _JSON_PARTS, spec, limits.nesting, "not JSON as accepted: ")
            _check_count("references", _REFERENCE, spec, limits.definitions)
        case "regex":
            _check_nesting("regex", _REGEX_PARTS, spec, limits.nesting)
        case "lark":
            _check_nesting("grammar", _LARK_PARTS, spec, limits.nesting)
            _check_count("rules and terminals", _LARK_DEFINITION, spec, limits.definitions)
        case "json_object":
            pass


def with_ascii_terminals(lark: str) -> str:
    """Return a Lark grammar whose regular expressions have classes of ASCII characters."""

    def write(found: re.Match[str]) -> str:
        part = found[0]
        is_regex = part.startswith("/") and not part.startswith("//")
        return with_ascii_classes(part) if is_regex else part

    return _LARK_PARTS.sub(write, lark)


def nesting(parts: re.Pattern[str], text: str) -> int:
    """Most brackets that are open at once; ``parts`` finds brackets, and what hides them."""
    depth = deepest = 0
    for found in parts.finditer(text):
        part = found.group()
        if part in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif part in ")]}":
            depth -= 1
    return deepest


def _check_nesting(
    what: str, parts: re.Pattern[str], text: str, most: int, prefix: str = ""
) -> None:
    deepest = nesting(parts, text)
    if deepest > most:
        raise GrammarError(f"{prefix}the {what} is nested {deepest} deep; at most {most} are taken")


def _check_count(what: str, definition: re.Pattern[str], text: str, most: int) -> None:
    count = sum(1 for _ in definition.finditer(text))
    if count > most:
        raise GrammarError(f"the grammar has {count} {what}; at most {most} are accepted")
