"""Reasoning of one model: its format, and what of its vocabulary and template belongs to that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pla_serve.server.reasoning.counter import ReasoningCounter
from pla_serve.server.reasoning.effort import thinking_variables
from pla_serve.server.reasoning.formats import (
    HARMONY,
    NO_REASONING,
    Beginning,
    choose_reasoning,
)
from pla_serve.server.reasoning.reader import ReasoningReader
from pla_serve.server.tools.events import AnswerReader
from pla_serve.server.tools.formats.harmony import HarmonyReader
from pla_serve.wire.engine import FreeThought


class ReasoningSupport:
    """Format in which a model reasons, and the tokens that belong to it.

    Args:
        tokenizer: fast tokenizer of transformers.
        template: the model's chat template; None if it has none.
        name: name of a format; "auto" recognises the format from the template.

    Raises:
        ValueError: no format has this name.
    """

    def __init__(self, tokenizer: Any, template: str | None, name: str = "auto") -> None:
        self._template = template or ""
        self.format = choose_reasoning(self._template, name)
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._tokens = {
            entry.content: token
            for token, entry in added.items()
            if entry.content in self.format.markers
        }
        self.keep = frozenset(self._tokens.values())
        """Tokens that have to stay in the text."""

    @property
    def reads(self) -> bool:
        """Whether answers may have reasoning."""
        return self.format is not NO_REASONING

    def switches(self, *, on: bool) -> dict[str, bool]:
        """Return the variables of the template that turn reasoning on or off; it may have none."""
        return thinking_variables(self._template, on=on)

    def beginning(self, prompt: str, continued: str | None = None) -> Beginning:
        """Return how an answer begins.

        Args:
            prompt: the rendered prompt, or its end.
            continued: text of the message that the answer continues; None if it begins one.
        """
        form, end = self.format, prompt.rstrip()
        if form is HARMONY or not self.reads:
            return Beginning.EITHER
        if continued:
            opened = max(continued.rfind(marker) for marker in form.opens)
            closed = max(continued.rfind(marker) for marker in form.closes)
            return Beginning.REASONING if opened > closed else Beginning.ANSWER
        if end.endswith(form.opens):
            return Beginning.REASONING
        if end.endswith(form.closes):
            return Beginning.ANSWER
        return form.begins

    def reader(
        self, beginning: Beginning, inner: AnswerReader | None = None, *, calls: bool = False
    ) -> AnswerReader:
        """Return a reader for one answer.

        Args:
            inner: reads what is no reasoning; None: it is text.
            calls: a call ends the reasoning. False where calls are not read, or where a grammar
                sees to it that the reasoning is closed.
        """
        if self.format is HARMONY:
            return inner or HarmonyReader(calls=False)
        marked = self.format.calls if calls else ()
        return ReasoningReader(self.format, beginning, inner, marked)

    def counter(
        self, beginning: Beginning, bytes_of: Callable[[int], bytes], *, calls: bool = False
    ) -> ReasoningCounter:
        """Return what counts the reasoning tokens of one answer; ``calls`` as in `reader`."""
        marked = self.format.calls if calls else ()
        return ReasoningCounter(self.format, beginning, bytes_of, marked)

    def thought(self, beginning: Beginning, most_tokens: int | None = None) -> FreeThought | None:
        """Return the reasoning that comes before a grammar; None if the grammar comes at once.

        Args:
            most_tokens: bound of the reasoning; it holds if one token closes the reasoning.
        """
        form = self.format
        if beginning is Beginning.ANSWER or form is HARMONY or not self.reads:
            return None
        opening = "" if beginning is Beginning.REASONING else form.opens[0]
        closing = form.closes[0]
        token = self._tokens.get(closing)
        bound = (most_tokens or 0) if token is not None else 0
        return FreeThought(closing, token, opening, self._tokens.get(opening), bound)

    @property
    def bounds(self) -> bool:
        """Whether `thought` can hold reasoning to a number of tokens."""
        closes = self.format.closes
        return self.format is not HARMONY and bool(closes) and closes[0] in self._tokens


def check_together(reasoning: ReasoningSupport, tool_format: str) -> None:
    """Check that a model can write both formats.

    Raises:
        ValueError: reasoning in harmony, and tool calls in another format.
    """
    if reasoning.format is HARMONY and tool_format != "harmony":
        raise ValueError(
            "--reasoning-parser harmony: its messages hold reasoning and calls, so it needs a chat "
            f"template that shows tools and --tool-parser harmony, not {tool_format}"
        )
