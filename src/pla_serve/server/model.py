"""The model as the API sees it: text to tokens and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pla_serve.server.api.endpoints import GrammarCheck


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Parts of a model that the API needs beside an engine; a router has no others."""

    tokenizer: Any
    """Tokenizer of transformers."""
    check_grammar: GrammarCheck
    """Refuses a grammar that no engine could follow."""
    chat_template: str | None = None
    """Jinja template that takes the place of the tokenizer's own; None leaves that."""
