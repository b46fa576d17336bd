"""The grammar of each format, by the format's name.

The compact objects of Gemma have no grammar here: where a call is required the model is held to
plain JSON, as vLLM does for all formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pla_serve.server.tools.formats import deepseek, harmony, hermes, mistral, qwen_coder
from pla_serve.server.tools.grammar import (
    CALL_OBJECT,
    TEXT,
    CallGrammar,
    GrammarWriter,
    call_array,
    call_object,
    is_plain_text,
    property_schema,
)
from pla_serve.server.tools.tool import Tool


class FormatGrammar(Protocol):
    """Writes the two grammars of a format."""

    def required(self, writer: GrammarWriter) -> str:
        """Return the grammar of an answer that is calls."""
        ...

    def optional(self, writer: GrammarWriter, content: str | None) -> str | None:
        """Return the grammar of an answer that may have calls; None if it is left free."""
        ...


def _hermes(writer: GrammarWriter) -> str:
    call = writer.each_tool("call", call_object(writer))
    return f'"\\n" {call} {writer.text(chr(10) + hermes.CLOSE)}'


def _plain(writer: GrammarWriter) -> str:
    return writer.each_tool("call", call_object(writer, opened=True))


def _llama(writer: GrammarWriter) -> str:
    return writer.each_tool("call", call_object(writer, key="parameters", opened=True))


def _mistral(writer: GrammarWriter) -> str:
    if mistral.ARGUMENTS not in writer.special:
        return call_array(writer)

    def call(tool: Tool) -> str:
        return f"{writer.text(tool.name + mistral.ARGUMENTS)} {writer.arguments(tool)}"

    return writer.each_tool("call", call)


def _granite_opening(writer: GrammarWriter) -> str:
    return "<|tool_call|>" if "<|tool_call|>" in writer.template else "<tool_call>"


def _deepseek(writer: GrammarWriter) -> str:
    fenced = "```json" in writer.template

    def call(tool: Tool) -> str:
        if fenced:
            head = f"{deepseek.BEGIN}function{deepseek.SEPARATOR}{tool.name}\n```json\n"
            tail = f"\n```{deepseek.END}"
        else:
            head, tail = f"{deepseek.BEGIN}{tool.name}{deepseek.SEPARATOR}", deepseek.END
        return f"{writer.text(head)} {writer.arguments(tool)} {writer.text(tail)}"

    calls = writer.several(writer.each_tool("call", call), "\n" if fenced else "")
    return f"{calls} {writer.text(deepseek.ALL_END)}"


def _qwen_coder(writer: GrammarWriter) -> str:
    end = f"\n{qwen_coder.END_PARAMETER}\n"
    writer.rule("free_text[lazy]", f"{TEXT} {writer.text(end)}")

    def call(tool: Tool) -> str:
        properties = tool.parameters.get("properties")
        required = tool.parameters.get("required") or ()
        parts = [writer.text(f"\n{qwen_coder.FUNCTION}{tool.name}>\n")]
        for key in properties if isinstance(properties, dict) else ():
            schema = property_schema(tool, key)
            value = f"{_unquoted(writer, schema, tool)} {writer.text(end)}"
            if is_plain_text(schema):
                value = "free_text"
            part = f"{writer.text(f'{qwen_coder.PARAMETER}{key}>{chr(10)}')} {value}"
            parts.append(part if key in required else f"({part})?")
        parts.append(writer.text(f"{qwen_coder.END_FUNCTION}\n{qwen_coder.CLOSE}"))
        return " ".join(parts)

    return writer.each_tool("call", call)


def _unquoted(writer: GrammarWriter, schema: dict[str, object], tool: Tool) -> str:
    """Return an expression for a value that is no free text: words of an enum, or JSON."""
    words = schema.get("enum")
    if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
        return "(" + " | ".join(writer.text(word) or '""' for word in words) + ")"
    return writer.json(schema, strict=tool.strict)


def _pythonic(writer: GrammarWriter) -> str:
    def call(tool: Tool) -> str:
        return f"{writer.text(tool.name + '(')} {_keywords(writer, tool)} {writer.text(')')}"

    return f'{writer.several(writer.each_tool("call", call), ", ")} "]"'


def _keywords(writer: GrammarWriter, tool: Tool) -> str:
    """Return an expression for ``key=value, …``: arguments that are required stand first."""
    properties = tool.parameters.get("properties")
    names = [name for name in properties or () if str(name).isidentifier()]
    required = [name for name in tool.parameters.get("required") or () if name in names]
    others = [name for name in names if name not in required]

    def pair(name: str) -> str:
        schema = property_schema(tool, name)
        return f"{writer.text(f'{name}=')} {writer.json(schema, strict=tool.strict)}"

    tails = [f'(", " {pair(name)})?' for name in others]
    if required:
        return " ".join([' ", " '.join(map(pair, required)), *tails])
    starts = [" ".join([pair(name), *tails[place + 1 :]]) for place, name in enumerate(others)]
    return f"({' | '.join(starts)})?" if starts else ""


class HarmonyGrammar:
    """Messages on channels; an answer ends with a call or with a message on the final channel."""

    def required(self, writer: GrammarWriter) -> str:
        self._asides(writer)
        self._calls(writer)
        return writer.finish("aside{0,8} call")

    def optional(self, writer: GrammarWriter, content: str | None) -> str | None:
        self._asides(writer)
        self._calls(writer)
        self._final(writer, content or TEXT)
        return writer.finish("aside{0,8} (call | final)")

    def answer(self, writer: GrammarWriter, content: str) -> str:
        """Return the grammar of an answer without calls."""
        self._asides(writer)
        self._final(writer, content)
        return writer.finish("aside{0,8} final")

    def _final(self, writer: GrammarWriter, content: str) -> None:
        head = writer.text(f"{harmony.CHANNEL}final{harmony.MESSAGE}")
        writer.rule("final", f"{head} {content}")

    def _asides(self, writer: GrammarWriter) -> None:
        following = writer.text(f"<|end|>{harmony.START}assistant")
        for name, channel in (("thought", "analysis"), ("preamble", "commentary")):
            head = writer.text(f"{harmony.CHANNEL}{channel}{harmony.MESSAGE}")
            writer.rule(name, f"{head} {TEXT} {following}")
        writer.rule("aside", "thought | preamble")

    def _calls(self, writer: GrammarWriter) -> None:
        def call(tool: Tool) -> str:
            head = (
                f"{harmony.CHANNEL}commentary to=functions.{tool.name} "
                f"<|constrain|>json{harmony.MESSAGE}"
            )
            return f"{writer.text(head)} {writer.arguments(tool)}"

        writer.each_tool("call", call)


PLAIN_GRAMMAR = CallGrammar(lambda writer: CALL_OBJECT, _plain, separator="\n", at_start=True)
GRAMMARS: Mapping[str, FormatGrammar] = {
    "harmony": HarmonyGrammar(),
    "deepseek": CallGrammar(lambda writer: deepseek.ALL_BEGIN, _deepseek, separator=None),
    "mistral": CallGrammar(lambda writer: mistral.MARKER, _mistral),
    "qwen3_coder": CallGrammar(lambda writer: qwen_coder.OPEN, _qwen_coder, separator="\n"),
    "granite": CallGrammar(_granite_opening, call_array, separator=None),
    "hermes": CallGrammar(lambda writer: hermes.OPEN, _hermes, separator="\n"),
    "pythonic": CallGrammar(lambda writer: "[", _pythonic, separator=None, triggers=False),
    "llama3_json": CallGrammar(lambda writer: CALL_OBJECT, _llama, separator="; ", at_start=True),
    "plain_json": PLAIN_GRAMMAR,
}
