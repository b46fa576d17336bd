"""Tool calls of one model: the format that it writes, and which of its tokens belong to that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pla_serve.server.tools.choice import PLAIN, choose_format
from pla_serve.server.tools.events import AnswerReader
from pla_serve.server.tools.tool import ToolUse


class ToolSupport:
    """The format of a model's calls.

    A model whose template shows no tools is told of them and of the plain JSON format in a system
    message, so it writes that one.

    Args:
        tokenizer: fast tokenizer of transformers.
        template: chat template of requests with tools; None if the model has none.
        name: format by name, or "auto" for the one that the template shows.

    Raises:
        ValueError: there is no such format, or the template cannot ask for it.

    Example:

        support = ToolSupport(tokenizer, template)
        support.format.name                  # "hermes"
        reader = support.reader(use)()
    """

    def __init__(self, tokenizer: Any, template: str | None, name: str = "auto") -> None:
        shows_tools = "tools" in (template or "")
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
            if entry.special and entry.content in self.format.markers
        }
        """Markers of the format that are special tokens of the vocabulary."""
        self.keep = frozenset(self.special.values())

    def reader(self, use: ToolUse) -> Callable[[], AnswerReader]:
        """Return what makes readers, one for each choice of an answer."""
        return lambda: self.format.reader(use.tools)
