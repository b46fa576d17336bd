"""The model as the API sees it: text to tokens and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pla_serve.server.embedding_model import EmbeddingModel
from pla_serve.server.generation.defaults import SamplingDefaults

if TYPE_CHECKING:
    from pla_serve.server.api.service import GrammarCheck


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Parts of a model that the API needs beside an engine; a router has no others."""

    tokenizer: Any
    """Tokenizer of transformers."""
    check_grammar: GrammarCheck
    """Refuses a grammar that no engine could follow."""
    chat_template: str | None = None
    """Jinja template that takes the place of the tokenizer's own; None leaves that."""
    vocab_size: int | None = None
    """Rows of the model's embedding; None if only the tokenizer is known."""
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    """Sampling parameters of requests that give none."""
    embeddings: EmbeddingModel = field(default_factory=EmbeddingModel)
    """How it makes vectors of texts."""

    @property
    def token_ids(self) -> int:
        """Token ids that a request may name: those of the model, or at least of the tokenizer."""
        return self.vocab_size or len(self.tokenizer)
