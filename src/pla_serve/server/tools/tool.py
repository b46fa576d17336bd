"""The functions that a request offers to the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Schema = dict[str, Any]
ANY_OBJECT: Schema = {"type": "object"}


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
