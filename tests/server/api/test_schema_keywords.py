"""Keywords of schemas: compiled, left out with a warning, or refused, as docs/api.md says."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from pla_serve.grammar.errors import GrammarError
from pla_serve.server.api.schema_keywords import FORMATS, relaxed, unheld
from pla_serve.wire.engine import Grammar
from tests.engine.tiny import grammar_compiler
from tests.server.server_harness import MODEL, ROOT, Live

OBJECT: dict[str, Any] = {"type": "object"}
ARRAY: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
STRING: dict[str, Any] = {"type": "string"}
INTEGER: dict[str, Any] = {"type": "integer"}
SAMPLES: dict[str, dict[str, Any]] = {
    "$anchor": {"$ref": "#x", "$defs": {"a": {"$anchor": "x", **STRING}}},
    "$defs": {"$ref": "#/$defs/a", "$defs": {"a": STRING}},
    "$dynamicRef": {"$dynamicRef": "#x", "$defs": {"a": {"$dynamicAnchor": "x", **STRING}}},
    "$recursiveRef": {**OBJECT, "properties": {"a": {"$recursiveRef": "#"}}},
    "$ref": {"$ref": "#/$defs/a", "$defs": {"a": STRING}},
    "$ref to another document": {"$ref": "https://example.com/schema.json"},
    "additionalItems": {"type": "array", "items": [STRING], "additionalItems": False},
    "additionalProperties": {**OBJECT, "additionalProperties": INTEGER},
    "allOf": {"allOf": [OBJECT, {"required": ["a"]}]},
    "anyOf": {"anyOf": [STRING, INTEGER]},
    "const": {"const": {"a": 1}},
    "contains": {**ARRAY, "contains": {"const": 1}},
    "definitions": {"$ref": "#/definitions/a", "definitions": {"a": STRING}},
    "dependencies": {**OBJECT, "dependencies": {"a": ["b"]}},
    "dependentRequired": {**OBJECT, "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {**OBJECT, "dependentSchemas": {"a": {"required": ["b"]}}},
    "else": {**OBJECT, "if": {"required": ["a"]}, "else": {"required": ["b"]}},
    "enum": {"enum": [1, "a", None]},
    "exclusiveMaximum": {**INTEGER, "exclusiveMaximum": 3},
    "exclusiveMinimum": {**INTEGER, "exclusiveMinimum": 3},
    "if": {**OBJECT, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "items": ARRAY,
    "maxContains": {**ARRAY, "contains": {"const": 1}, "maxContains": 2},
    "maxItems": {**ARRAY, "maxItems": 2},
    "maxLength": {**STRING, "maxLength": 2},
    "maxProperties": {**OBJECT, "maxProperties": 2},
    "maximum": {**INTEGER, "maximum": 3},
    "minContains": {**ARRAY, "contains": {"const": 1}, "minContains": 2},
    "minItems": {**ARRAY, "minItems": 2},
    "minLength": {**STRING, "minLength": 2},
    "minProperties": {**OBJECT, "minProperties": 1},
    "minimum": {**INTEGER, "minimum": 3},
    "multipleOf": {**INTEGER, "multipleOf": 3},
    "not": {**STRING, "not": {"const": "a"}},
    "oneOf": {"oneOf": [STRING, INTEGER]},
    "oneOf whose alternatives overlap": {"oneOf": [INTEGER, {"type": "number"}]},
    "pattern": {**STRING, "pattern": "^a+$"},
    "patternProperties": {**OBJECT, "patternProperties": {"^a": INTEGER}},
    "prefixItems": {"type": "array", "prefixItems": [STRING, INTEGER], "items": False},
    "properties": {**OBJECT, "properties": {"a": STRING}},
    "propertyNames": {**OBJECT, "propertyNames": {"pattern": "^a"}},
    "required": {**OBJECT, "required": ["a"]},
    "then": {**OBJECT, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "type": OBJECT,
    "unevaluatedItems": {**ARRAY, "unevaluatedItems": False},
    "unevaluatedProperties": {**OBJECT, "unevaluatedProperties": False},
    "uniqueItems": {**ARRAY, "uniqueItems": True},
    **{f"format: {name}": {**STRING, "format": name} for name in sorted(FORMATS - {"unknown"})},
    "format of any other name": {**STRING, "format": "iri"},
}


def documented() -> dict[str, str]:
    """What docs/api.md says of each keyword: the table after the heading Schemas."""
    section = (ROOT / "docs/api.md").read_text().split("### Schemas\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| (held|not held|refused) \| (.*) \|$", section, re.MULTILINE)
    found = {}
    for what, names in rows:
        for name in names.split(", "):
            found[name.replace("`", "")] = what
    return found


def compiles(schema: Any) -> bool:
    try:
        grammar_compiler().start(Grammar("json_schema", json.dumps(schema)))
    except GrammarError:
        return False
    return True


def test_the_table_has_every_keyword() -> None:
    assert set(documented()) == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_table_is_true(name: str) -> None:
    schema, said = SAMPLES[name], documented()[name]
    keyword = name.split(" ", 1)[0].rstrip(":")
    if said == "held":
        assert compiles(schema)
        assert relaxed(schema) == schema
        assert not unheld(schema)
    elif said == "not held":
        assert not compiles(schema), "the library can hold it now"
        assert compiles(relaxed(schema))
        assert keyword in unheld(schema)
        assert keyword not in relaxed(schema)
    else:
        assert not compiles(relaxed(schema))


def test_names_constants_and_examples_are_no_keywords() -> None:
    schema = {
        "type": "object",
        "properties": {"not": STRING, "if": {"uniqueItems": True, **ARRAY}, "format": STRING},
        "enum": [{"not": 1}],
        "default": {"contains": {}},
        "examples": [{"uniqueItems": True}],
        "$defs": {"contains": {"not": {"not": {}}}},
        "anyOf": [{"properties": {"a": {"items": [{"contains": True}], "format": 3}}}],
    }
    assert unheld(schema) == {"uniqueItems", "not", "contains"}
    left = relaxed(schema)
    assert set(left["properties"]) == {"not", "if", "format"}
    assert left["properties"]["if"] == ARRAY
    assert left["enum"] == schema["enum"]
    assert left["$defs"] == {"contains": {}}
    assert left["anyOf"] == [{"properties": {"a": {"items": [{}], "format": 3}}}]


def test_what_says_nothing_is_left_out_without_a_word() -> None:
    schema = {**ARRAY, "uniqueItems": False}
    assert relaxed(schema) == ARRAY
    assert not unheld(schema)
    assert relaxed(True) is True
    assert not unheld(False)


SET = {**ARRAY, "uniqueItems": True}


def form(strict: bool | None) -> dict[str, Any]:
    schema = {"name": "s", "schema": SET, "strict": strict}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def tool(strict: bool | None) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": SET}}
    return {
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "parameters": parameters, "strict": strict},
            }
        ]
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "warns"),
    [
        (form(None), True),
        (form(False), True),
        (form(True), False),
        ({"guided_json": SET}, True),
        ({"guided_json": json.dumps(SET)}, True),
        ({"structured_outputs": {"json": SET}}, True),
        ({"guided_json": ARRAY}, False),
        ({"guided_regex": "a"}, False),
        (tool(None), True),
        (tool(True), False),
        ({}, False),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_answers_say_what_is_not_held(
    live: Live, fields: dict[str, Any], warns: bool, stream: bool
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": stream}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json={**body, **fields})
    assert answer.status_code == 200, answer.text
    right = 'keywords of the schema that the answer is not held to: uniqueItems"'
    assert answer.headers.get("warning") == (f'299 pla-serve "{right}' if warns else None)
