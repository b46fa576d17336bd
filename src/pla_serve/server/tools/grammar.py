"""Grammars that hold a model to the format of its calls, in llguidance's Lark.

Where a call is required the grammar is one of calls from the first token. Where it is not, text is
free up to the marker that opens a call and the call follows that. Arguments are ``%json`` of the
function's schema. Markers that are special tokens of the vocabulary are written as such: text never
matches them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pla_serve.server.tools.tool import ANY_OBJECT, Schema, Tool, ToolUse, takes_text

MOST_CALLS = 32
"""Calls in one answer that a grammar allows."""
WHITESPACE = r"[ \n\t\r]{0,64}"
"""Between the parts of JSON. Bounded, or a small model can write blanks until its last token."""
TEXT = "TEXT"
"""Terminal of free text."""
CALL_OBJECT = '{"name": "'
"""Beginning of a call that is a JSON object."""


@dataclass(slots=True)
class GrammarWriter:
    """Writes the rules of one grammar.

    Attributes:
        use: the functions, and how the answer may use them.
        special: markers that are special tokens, with their ids.
        template: the model's chat template, which tells versions of a format apart.
        loose: write arguments of functions that are not strict as any object.
    """

    use: ToolUse
    special: Mapping[str, int]
    template: str = ""
    loose: bool = False
    rules: list[str] = field(default_factory=list)

    def text(self, text: str) -> str:
        """Return an expression for ``text``."""
        for marker, token in self.special.items():
            before, found, after = text.partition(marker)
            if found:
                parts = (self.text(before), f"<[{token}]>", self.text(after))
                return " ".join(part for part in parts if part)
        return json.dumps(text, ensure_ascii=False) if text else ""

    def json(self, schema: Schema, *, strict: bool) -> str:
        """Return an expression for JSON that fits ``schema``; keywords unknown to the library are
        passed over if it is not ``strict``."""
        options = {"whitespace_pattern": WHITESPACE, "lenient": not strict}
        return "%json " + json.dumps({**schema, "x-guidance": options})

    def arguments(self, tool: Tool) -> str:
        """Return an expression for the arguments of ``tool`` as a JSON object."""
        schema = ANY_OBJECT if self.loose and not tool.strict else tool.parameters
        return self.json(schema, strict=tool.strict)

    def rule(self, name: str, expression: str) -> str:
        """Add a rule; return its name."""
        self.rules.append(f"{name}: {expression}")
        return name

    def each_tool(self, name: str, write: Callable[[Tool], str]) -> str:
        """Add a rule that is one of what ``write`` returns for the functions."""
        found = []
        for place, tool_name in enumerate(self.use.may_call):
            found.append(self.rule(f"{name}_{place}", write(self.use.tools[tool_name])))
        return self.rule(name, " | ".join(found))

    def several(self, item: str, separator: str) -> str:
        """Return an expression for one ``item``, or several if the request allows that."""
        if not self.use.parallel:
            return item
        between = self.text(separator)
        return f"{item} ({between} {item}){{0,{MOST_CALLS - 1}}}"

    def finish(self, start: str) -> str:
        """Return the whole grammar."""
        lines = ["%llguidance {}", f"start: {start}", *self.rules, rf"{TEXT}: /(.|\n)*/"]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """What a format's grammar is made of.

    Attributes:
        opening: marker that opens a call; gets the writer, for formats with several versions.
        block: adds the rules of what follows the marker and returns their expression.
        separator: text between two blocks; None if an answer has only one.
        at_start: calls stand at the start of an answer only.
        triggers: text may turn into a call at ``opening``. False: only required calls are held to
            the format.
    """

    opening: Callable[[GrammarWriter], str]
    block: Callable[[GrammarWriter], str]
    separator: str | None = ""
    at_start: bool = False
    triggers: bool = True

    def required(self, writer: GrammarWriter) -> str:
        """Return the grammar of an answer that is calls."""
        block = writer.rule("block", f"{writer.text(self.opening(writer))} {self.block(writer)}")
        if self.separator is None:
            return writer.finish(block)
        return writer.finish(writer.several(block, self.separator))

    def optional(self, writer: GrammarWriter, content: str | None) -> str | None:
        """Return the grammar of an answer that may have calls, or None if there is none.

        Args:
            content: expression for an answer without calls; None is free text.
        """
        if not self.triggers:
            return None
        opening = self.opening(writer)
        body = writer.rule("body", self.block(writer))
        several = writer.use.parallel and self.separator is not None
        if content is not None:
            calls = writer.rule("block", f"{writer.text(opening)} {body}")
            if several:
                calls = writer.several(calls, self.separator or "")
            return writer.finish(f"{calls} | {content}")
        head = self._head(writer, opening)
        if several and not self.at_start:
            return writer.finish(f"({head} {body}){{0,{MOST_CALLS}}} {TEXT}")
        more = ""
        if several:
            more = f"{writer.text(self.separator or '')} {writer.text(opening)} {body}"
            more = f"({more}){{0,{MOST_CALLS - 1}}}"
        return writer.finish(f"{head} {body} {more} | {TEXT}")

    def _head(self, writer: GrammarWriter, opening: str) -> str:
        """Add the rule of free text that ends with ``opening``; return its name."""
        marker = writer.text(opening)
        if opening in writer.special:
            return writer.rule("head", f"{TEXT} {marker}")
        before = r"/[ \n\t]*/" if self.at_start else TEXT
        writer.rule("head[lazy]", f"{before} {marker}")
        return "head"


def call_object(
    writer: GrammarWriter, *, key: str = "arguments", opened: bool = False
) -> Callable[[Tool], str]:
    """Return what writes ``{"name": …, "arguments": …}``; ``opened``: from the name on."""

    def write(tool: Tool) -> str:
        head = ("" if opened else CALL_OBJECT) + tool.name + f'", "{key}": '
        return f"{writer.text(head)} {writer.arguments(tool)} {writer.text('}')}"

    return write


def call_array(writer: GrammarWriter) -> str:
    """Return an expression for ``[call, call, …]``."""
    call = writer.each_tool("call", call_object(writer))
    return f'" "? "[" {writer.several(call, ", ")} "]"'


def property_schema(tool: Tool, key: str) -> Schema:
    """Return the schema of one argument, with the definitions that it may refer to."""
    kept: Schema = {
        name: tool.parameters[name] for name in ("$defs", "definitions") if name in tool.parameters
    }
    return {**tool.property_schema(key), **kept}


def is_plain_text(schema: Schema) -> bool:
    """Whether an argument without quotes is free text."""
    return takes_text(schema) and "enum" not in schema
