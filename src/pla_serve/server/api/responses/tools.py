"""Tools and the choice among them, as clients of the Responses API send them.

A namespace is a group of functions. The model is shown its functions by names that begin with that
of the group; calls name the two apart again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
)

from pla_serve.server.api.formats import Json
from pla_serve.server.api.strict import Strict, refuse
from pla_serve.server.api.tool_schema import MAX_TOOLS, FunctionDefinition

SEARCHES = (
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
)
KINDS = ("function", "namespace", *SEARCHES)
_TEXT = {"type": "string"}


class FunctionTool(FunctionDefinition):
    """A function, with its fields beside its type."""

    type: Literal["function"]
    # The rest is accepted only where it asks for nothing.
    defer_loading: Literal[False] | None = None
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=1)] | None = None
    output_schema: None = None

    def chat_tools(self, prefix: str = "") -> list[Json]:
        """Return the entries of ``tools`` of a chat request that say the same."""
        function = {**self.given(), "name": prefix + self.name}
        return [{"type": "function", "function": function}]

    def shown(self) -> Json:
        """Return the tool as an answer repeats it."""
        fields = {"description": None, "parameters": None, "strict": None}
        more: Json = {} if self.defer_loading is None else {"defer_loading": self.defer_loading}
        if self.allowed_callers is not None:
            more["allowed_callers"] = self.allowed_callers
        return {**fields, **self.given(), **more, "type": "function"}


class NamespaceTool(Strict):
    """A group of functions."""

    type: Literal["namespace"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str = ""
    """Accepted, not used: chat templates show functions one by one."""
    tools: list[FunctionTool] = Field(max_length=MAX_TOOLS, fail_fast=True)

    def chat_tools(self) -> list[Json]:
        """Return the entries of ``tools`` of a chat request that say the same."""
        return [each for tool in self.tools for each in tool.chat_tools(flat_name(self.name, ""))]

    def shown(self) -> Json:
        """Return the group as an answer repeats it."""
        return {
            "type": self.type,
            "name": self.name,
            "description": self.description,
            "tools": [tool.shown() for tool in self.tools],
        }


class SearchTool(BaseModel):
    """A search that OpenAI's servers run by themselves.

    Coding agents offer it with every request. The model is not shown it and answers without it, as
    it might anyway. The answer does not list it.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    type: Literal[
        "web_search",
        "web_search_2025_08_26",
        "web_search_preview",
        "web_search_preview_2025_03_11",
    ]

    def chat_tools(self) -> list[Json]:
        """Return no entry: the model is not shown the search."""
        return []


def _known(value: object) -> object:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is not None and kind not in KINDS:
        raise refuse(
            "tools",
            f"tools of type {str(kind)[:50]} are not supported, only functions: this server runs "
            "no tools itself",
        )
    return value


ResponseTool = Annotated[
    FunctionTool | NamespaceTool | SearchTool,
    Field(discriminator="type"),
    BeforeValidator(_known),
]


def flat_name(namespace: str | None, name: str) -> str:
    """Return the name by which the model is shown a function."""
    return f"{namespace}__{name}" if namespace else name


def namespaces(tools: Iterable[ResponseTool]) -> dict[str, tuple[str, str]]:
    """Return group and name of every function of a group, by the name that the model is shown."""
    return {
        flat_name(group.name, tool.name): (group.name, tool.name)
        for group in tools
        if isinstance(group, NamespaceTool)
        for tool in group.tools
    }


def read_choice(value: object) -> object:
    """Return ``tool_choice`` as chat requests have it.

    Raises:
        PydanticCustomError: the type of the choice is not supported.
        ValueError: the value is no choice at all.
    """
    if value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict):
        kind = value.get("type")
        if kind != "function":
            raise refuse("tool_choice", f"tool_choice of type {str(kind)[:50]} is not supported")
        if isinstance(value.get("name"), str):
            return {"type": "function", "function": {"name": value["name"]}}
    raise ValueError("give none, auto, required, or an object of type function with a name")


_NAMED = {"type": "object", "properties": {"type": {"const": "function"}, "name": _TEXT}}
Choice = Annotated[
    Any,
    PlainValidator(read_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required", None]}, _NAMED]}),
]
