"""Keywords of JSON schemas that the grammar library cannot hold a model to.

A keyword that only narrows what a schema allows can be left out: the answer is still of the rest of
the schema, and the client is told (`unheld`). A schema with any other unknown keyword, such as
``$dynamicRef``, is refused when it is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NARROWING = frozenset(
    {
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "minContains",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)
FORMATS = frozenset(
    {
        "date",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "time",
        "unknown",
        "uri",
        "uuid",
    }
)
"""Values of ``format`` that the library knows; others are a narrowing keyword as well."""
_SCHEMAS_BY_NAME = frozenset(
    {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
)
_SCHEMAS = frozenset({"additionalItems", "additionalProperties", "items"})
_LISTS_OF_SCHEMAS = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})


def relaxed(schema: Any) -> Any:
    """Return a schema without the keywords that are not held.

    Names of properties, constants and examples are no keywords and stay.
    """
    if not isinstance(schema, dict):
        return schema
    return {
        keyword: _relaxed_value(keyword, value)
        for keyword, value in schema.items()
        if not _is_unheld(keyword, value)
    }


def unheld(schema: Any) -> set[str]:
    """Return the keywords that `relaxed` leaves out, but for those that say nothing."""
    found: set[str] = set()
    stack = [schema]
    while stack:
        schema = stack.pop()
        if not isinstance(schema, dict):
            continue
        for keyword, value in schema.items():
            if not _is_unheld(keyword, value):
                stack.extend(_inner(keyword, value))
            elif value is not False or keyword != "uniqueItems":
                found.add(keyword)
    return found


def _is_unheld(keyword: str, value: Any) -> bool:
    if keyword == "format":
        return isinstance(value, str) and value not in FORMATS
    return keyword in NARROWING


def _relaxed_value(keyword: str, value: Any) -> Any:
    if keyword in _SCHEMAS_BY_NAME and isinstance(value, dict):
        return {name: relaxed(each) for name, each in value.items()}
    if keyword in _LISTS_OF_SCHEMAS and isinstance(value, list):
        return [relaxed(each) for each in value]
    return relaxed(value) if keyword in _SCHEMAS else value


def _inner(keyword: str, value: Any) -> Iterator[Any]:
    """Yield the schemas that stand under a keyword."""
    if keyword in _SCHEMAS_BY_NAME and isinstance(value, dict):
        yield from value.values()
    elif keyword in _LISTS_OF_SCHEMAS and isinstance(value, list):
        yield from value
    elif keyword in _SCHEMAS:
        yield value
