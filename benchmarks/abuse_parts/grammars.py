"""Hostile grammars, grown from a random generator: the same seed gives the same ones.

    for kind, text in islice(hostile_grammars(Random(7)), 100):
        ...                         # kind is "json_schema", "regex" or "lark"

Each is made by one of the ways in which grammars have cost a server its stack, memory, processor
or loop, with random sizes from harmless to far beyond any limit. Most are refused by a good server,
some are followed; none may hurt another request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Literal

Kind = Literal["json_schema", "regex", "lark"]
Make = Callable[[Random], str]


def hostile_grammars(rng: Random) -> Iterator[tuple[Kind, str]]:
    """Without end; all ways come equally often."""
    ways: list[tuple[Kind, Make]] = [
        *(("regex", make) for make in REGEXES),
        *(("json_schema", make) for make in SCHEMAS),
        *(("lark", make) for make in LARKS),
    ]
    while True:
        rng.shuffle(ways)
        for kind, make in ways:
            yield kind, make(rng)


def size(rng: Random, most: int) -> int:
    """From 1 to ``most``, small and large ones alike."""
    return max(1, round(most ** rng.random()))


# Regular expressions


def nested_repetition(rng: Random) -> str:
    """((a{n}){n}){n}: the states multiply."""
    text = rng.choice(("a", "[ab]", "(a|b)", r"\w", ".", "(?s:.)"))
    for _ in range(rng.randint(1, 5)):
        least = rng.choice(("", "0,", "1,"))
        text = f"({text}{rng.choice(('', 'c?', '|d'))}){{{least}{size(rng, 1000)}}}"
    return text


def exponential_states(rng: Random) -> str:
    """[ab]*a[ab]{n}: a deterministic automaton has 2^n states."""
    parts = [f"[ab]*a[ab]{{{size(rng, 2000)}}}" for _ in range(rng.randint(1, 4))]
    return rng.choice(("|", "c", "")).join(parts) + "d"


def nested_groups(rng: Random) -> str:
    depth = size(rng, 50_000)
    star = rng.choice(("", "*", "+", "?", "{0,3}"))
    return "(" * depth + "a" + f"){star}" * depth


def many_alternatives(rng: Random) -> str:
    letters = [rng.choice("abcdefgh") for _ in range(30)]
    return "|".join(
        "".join(letters[: rng.randint(1, 30)]) + str(i) for i in range(size(rng, 20_000))
    )


def wide_classes(rng: Random) -> str:
    step = rng.randint(2, 5)
    members = "".join(chr(0x4E00 + step * i) for i in range(size(rng, 6000)))
    return f"[{members}]{{{size(rng, 10_000)}}}" + rng.choice(("", r"\p{L}{1,500}", r"[^\w]+"))


def look_around(rng: Random) -> str:
    look = rng.choice(("?=", "?!", "?<=", "?<!"))
    return f"({look}.*a)" * size(rng, 500) + "b"


# JSON schemas


def multiples(rng: Random) -> str:
    """The compiler counts remainders: one state for each."""
    one = {"type": rng.choice(("integer", "number")), "multipleOf": size(rng, 10**9)}
    if rng.random() < 0.5:
        return json.dumps(one)
    return json.dumps({"allOf": [one, *({"multipleOf": size(rng, 97)} for _ in range(5))]})


def long_ranges(rng: Random) -> str:
    least = size(rng, 10**6)
    most = least * size(rng, 1000)
    shape: dict[str, Any] = rng.choice(
        (
            {"type": "string", "minLength": least, "maxLength": most},
            {"type": "array", "items": {"type": "integer"}, "minItems": least, "maxItems": most},
            {"type": "object", "minProperties": least, "maxProperties": most},
            {"type": "string", "pattern": f"^[a-z]{{{least}}}$", "maxLength": most},
            {"type": "number", "minimum": least / 7, "maximum": most * 1e9 / 11},
        )
    )
    return json.dumps(shape)


def many_values(rng: Random) -> str:
    values = [f"{i * 7919 % 100_003}-{'x' * rng.randint(0, 9)}" for i in range(size(rng, 20_000))]
    key = rng.choice(("enum", "anyOf", "oneOf"))
    return json.dumps({key: values if key == "enum" else [{"const": one} for one in values]})


def reference_chain(rng: Random) -> str:
    length, cyclic = size(rng, 20_000), rng.random() < 0.3
    links: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    links[f"d{length}"] = {"$ref": "#/$defs/d0"} if cyclic else {"type": "integer"}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": links})


def endless_recursion(rng: Random) -> str:
    """No text satisfies it, because each needs another one inside."""
    inner: dict[str, Any] = {"$ref": "#"}
    if rng.random() < 0.7:
        inner = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    return json.dumps(inner)


def deep_schema(rng: Random) -> str:
    depth = size(rng, 20_000)
    opening, closing = rng.choice(
        (
            ('{"type":"array","items":', "}"),
            ('{"type":"object","properties":{"a":', "}}"),
            ('{"anyOf":[', "]}"),
            ('{"allOf":[', "]}"),
        )
    )
    return opening * depth + "{}" + closing * depth


def products(rng: Random) -> str:
    """allOf over anyOf: the branches multiply."""
    width, height = rng.randint(2, 6), rng.randint(2, 12)

    def branch(row: int, column: int) -> dict[str, Any]:
        name = f"a{row}{column}"
        return rng.choice(
            (
                {"type": "object", "properties": {name: {"type": "integer"}}},
                {"type": "string", "pattern": f".*{name}.*"},
            )
        )

    rows = [{"anyOf": [branch(row, column) for column in range(width)]} for row in range(height)]
    return json.dumps({"allOf": rows})


def pattern_properties(rng: Random) -> str:
    names = [f"^{chr(97 + i % 26)}{{{1 + i // 26}}}[0-9]*x$" for i in range(size(rng, 500))]
    return json.dumps(
        {"type": "object", "patternProperties": {name: {"type": "integer"} for name in names}}
    )


# Lark


def rule_chain(rng: Random) -> str:
    """The compiler follows it by recursion."""
    length, name = size(rng, 20_000), rng.choice("rR")
    lines = [f"{name}{i}: {name}{i + 1}" for i in range(length)]
    return "\n".join([f"start: {name}0", *lines, f'{name}{length}: "a"'])


def ambiguity(rng: Random) -> str:
    """The parser keeps all ways in which a text can be read."""
    more = rng.choice((" | s s s", " | s s s s | ", ' | s "x" s', ""))
    return f"start: s\ns: s s | {rng.choice((chr(34) + 'x' + chr(34), '/x/', '/[xy]+/'))}{more}"


def no_beginning(rng: Random) -> str:
    length = size(rng, 50)
    lines = [f"r{i}: r{(i + 1) % length}{rng.choice(('', ' X'))}" for i in range(length)]
    return "\n".join(["start: r0", *lines, 'X: "a"'])


def repeated_rules(rng: Random) -> str:
    least = size(rng, 10**6)
    inner = rng.choice(('"a"', '"a" | "b"', "", "e2~1000", "/.{1,50}/"))
    return f'start: e~{least}..{least * 2} "z"\ne: {inner}\ne2: "c"'


def terminal_sets(rng: Random) -> str:
    count = rng.randint(2, 8)
    parts = [f"/(.*{chr(97 + i)}.{{{size(rng, 300)}}})/" for i in range(count)]
    return f"start: T\nT: {' & '.join(parts)} & ~/x{{{size(rng, 1000)}}}.*/"


def wide_choice(rng: Random) -> str:
    return "start: " + "|".join(f'"{i * 7919 % 100_003}-x"' for i in range(size(rng, 15_000)))


def nested_brackets(rng: Random) -> str:
    depth = size(rng, 50_000)
    opening, closing = rng.choice(("()", "[]"))
    return "start: " + opening * depth + '"a"' + closing * depth


def noise(rng: Random) -> str:
    """What no grammar is made of."""
    alphabet = 'start: r~/[]{}()|*+?"\\%import &~ab1\n\t\u2028é'
    return "".join(rng.choice(alphabet) for _ in range(size(rng, 5000)))


REGEXES: tuple[Make, ...] = (
    nested_repetition,
    exponential_states,
    nested_groups,
    many_alternatives,
    wide_classes,
    look_around,
    noise,
)
SCHEMAS: tuple[Make, ...] = (
    multiples,
    long_ranges,
    many_values,
    reference_chain,
    endless_recursion,
    deep_schema,
    products,
    pattern_properties,
    noise,
)
LARKS: tuple[Make, ...] = (
    rule_chain,
    ambiguity,
    no_beginning,
    repeated_rules,
    terminal_sets,
    wide_choice,
    nested_brackets,
    noise,
)
