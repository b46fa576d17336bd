"""Tool calls of one model: the format that it writes, and which of its tokens belong to that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pla_serve.server.tools.choice import PLAIN, choose_format
from pla_serve.server.tools.events import AnswerReader
from pla_serve.server.tools.format_grammars import (
    GRAMMARS,
    PLAIN_GRAMMAR,
    FormatGrammar,
    HarmonyGrammar,
)
from pla_serve.server.tools.formats import harmony
from pla_serve.server.tools.grammar import CallGrammar, GrammarWriter
from pla_serve.server.tools.tool import Schema, ToolUse


class ToolSupport:
    """Format in which a model writes tool calls, and the special tokens that belong to it.

    If the chat template does not render ``tools``, a system message describes the tools and asks
    for calls in the plain JSON format.

    Args:
        tokenizer: fast tokenizer of transformers.
        template: chat template of requests with tools; None if the model has none.
        name: name of a format; "auto" recognises the format from the template.

    Raises:
        ValueError: no format has this name, or the template does not render tools for it.

    Example:

        support = ToolSupport(tokenizer, template)
        support.format.name                  # "hermes"
        reader = support.reader(use)()
    """

    def __init__(self, tokenizer: Any, template: str | None, name: str = "auto") -> None:
        self._template = template or ""
        shows_tools = "tools" in self._template
        self.format = choose_format(template or "", name)
        if template and not shows_tools:
            if name not in ("auto", PLAIN.name):
                raise ValueError(
                    f"--tool-parser {name}: the model's chat template shows no tools, so the "
                    f"model is asked for {PLAIN.name}; give a template with --chat-template"
                )
            self.format = PLAIN
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self.special = {
            entry.content: token
            for token, entry in added.items()
            if entry.content in self.format.markers
        }
        """Markers of the format that are tokens of their own. Grammars have to name these: the
        text of a marker would be spelled with other tokens."""
        self.keep = frozenset(self.special.values())

    def reader(self, use: ToolUse) -> Callable[[], AnswerReader]:
        """Return what makes readers, one for each choice of an answer."""
        written = PLAIN if use.must_call and self._grammar() is None else self.format
        return lambda: written.reader(use.tools)

    def grammar(
        self, use: ToolUse, content: Schema | None = None, *, loose: bool = False
    ) -> str | None:
        """Return the grammar of an answer in Lark, or None if the answer is left free.

        Args:
            use: the functions, and whether one has to be called.
            content: schema of an answer without calls; None: it is free text.
            loose: let the arguments of functions that are not strict be any object.

        Raises:
            ValueError: the format cannot tell such an answer from a call.
        """
        writer = GrammarWriter(use, self.special, self._template, loose)
        known = self._grammar()
        if use.must_call:
            return (known or PLAIN_GRAMMAR).required(writer)
        if content is None:
            return None if known is None else known.optional(writer, None)
        if known is None or self.format.name in UNMARKED:
            raise ValueError(
                "this model's tool calls cannot be told from an answer in JSON; set tool_choice to "
                "none or required, or leave out response_format"
            )
        return known.optional(writer, writer.json(content, strict=True))

    def answer_grammar(self, content: Schema) -> str | None:
        """Return the grammar, in Lark, of an answer in JSON to a request without tools.

        None: the format puts no markers around such an answer, so its schema is all of the grammar.
        """
        known = self._grammar()
        if not isinstance(known, HarmonyGrammar):
            return None
        writer = GrammarWriter(ToolUse({}), self.special, self._template)
        return known.answer(writer, writer.json(content, strict=True))

    @property
    def calls_at_start(self) -> bool:
        """Whether calls stand at the start of an answer only."""
        known = self._grammar()
        return isinstance(known, CallGrammar) and known.at_start

    def _grammar(self) -> FormatGrammar | None:
        if self.format.name == "harmony" and not self.special.keys() >= set(harmony.MARKERS[:4]):
            return None
        return GRAMMARS.get(self.format.name)


UNMARKED = ("plain_json", "llama3_json", "pythonic")
"""Formats whose calls begin as other answers in JSON may."""
