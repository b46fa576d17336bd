"""The functions that a request offers to the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Schema = dict[str, Any]
ANY_OBJECT: Schema = {"type": "object"}
NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
"""Schema of a function that takes no arguments."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One function.

    Attributes:
        name: as the model writes it.
        parameters: JSON schema of its arguments, an object.
        strict: the arguments of a call have to fit the schema, not only to parse.
    """

    name: str
    description: str = ""
    parameters: Schema = field(default_factory=lambda: dict(ANY_OBJECT))
    strict: bool = False

    def property_schema(self, key: str) -> Schema:
        """Schema of one argument; empty if the function does not declare it."""
        properties = self.parameters.get("properties")
        found = properties.get(key) if isinstance(properties, dict) else None
        return found if isinstance(found, dict) else {}


Tools = Mapping[str, Tool]
"""By name."""


def takes_text(schema: Schema) -> bool:
    """Whether an argument that a format writes without quotes is a string as it stands."""
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "enum" in schema:
        return all(isinstance(value, str) for value in schema["enum"])
    return "string" in kinds and not {"object", "array"} & set(kinds)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How one request lets the model use tools.

    Attributes:
        tools: all functions that are offered.
        must_call: the answer has to be calls.
        may_call: names of the functions that may be called; one of them where the client named it.
        parallel: an answer may have several calls.
    """

    tools: Tools
    must_call: bool = False
    may_call: tuple[str, ...] = ()
    parallel: bool = True

    @property
    def strict(self) -> bool:
        """Whether arguments of any function have to fit its schema."""
        return any(self.tools[name].strict for name in self.may_call)
