"""Fields of a chat request that offer tools to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, field_validator

from pla_serve.server.api.strict import Strict, refuse
from pla_serve.server.tools.tool import ANY_OBJECT, NO_ARGUMENTS, Tool

MAX_TOOLS = 128
TOOL_NAME = r"^[a-zA-Z0-9_.-]{1,128}$"


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments; without it the function takes none."""
    strict: bool | None = None
    """The arguments fit ``parameters`` exactly, or the request is refused."""

    @field_validator("parameters")
    @classmethod
    def _are_of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type", "object") != "object":
            raise ValueError("the arguments of a function are an object: type must be object")
        return value

    def given(self) -> dict[str, Any]:
        """Return the fields of a function that the client has given, in a fixed order.

        The schema is not copied: pydantic would hold the interpreter lock until it has gone through
        a large one.
        """
        given = self.model_fields_set
        return {n: getattr(self, n) for n in FunctionDefinition.model_fields if n in given}


class ToolDefinition(Strict):
    """One entry of ``tools``."""

    type: Literal["function"]
    function: FunctionDefinition
    cache_control: dict[str, Any] | None = None
    """Accepted, not used."""

    def tool(self) -> Tool:
        """Return the tool as readers and grammars take it."""
        function = self.function
        parameters = NO_ARGUMENTS
        if function.parameters is not None:
            parameters = {**ANY_OBJECT, **function.parameters}
        return Tool(
            function.name, function.description or "", parameters, strict=bool(function.strict)
        )

    def shown(self) -> dict[str, Any]:
        """Return the tool as chat templates take it: as the client wrote it."""
        return {"type": self.type, "function": self.function.given()}


@dataclass(frozen=True, slots=True)
class NamedFunction:
    """A ``tool_choice`` that names the function to call."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedFunction


def read_tool_choice(value: object) -> ToolChoice:
    """Return ``tool_choice`` in either of its two shapes."""
    if value == "none" or value == "auto" or value == "required":
        return value
    if isinstance(value, dict):
        kind, function = value.get("type"), value.get("function")
        if kind != "function":
            raise refuse("tool_choice", f"tool_choice of type {str(kind)[:50]} is not supported")
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return NamedFunction(function["name"])
    raise ValueError(
        "give none, auto, required, or an object of type function with the function's name"
    )


ToolChoiceField = Annotated[
    ToolChoice | None,
    PlainValidator(read_tool_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required", None]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}},
                            "required": ["name"],
                        },
                    },
                    "required": ["type", "function"],
                },
            ]
        }
    ),
]
