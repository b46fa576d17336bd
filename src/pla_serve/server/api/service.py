"""Objects that the endpoints of one server share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pla_serve.server.api.logprobs import TokenNames
from pla_serve.server.api.prompts import PromptEncoder
from pla_serve.server.embedding_model import EmbeddingModel
from pla_serve.server.engine.backend import Backend, EngineUnavailableError
from pla_serve.server.errors import ApiError, unavailable
from pla_serve.server.generation.defaults import SamplingDefaults
from pla_serve.server.generation.detokenize import TokenBytes
from pla_serve.server.reasoning.support import ReasoningSupport
from pla_serve.server.records.journal import Journal
from pla_serve.server.records.metrics import Metrics
from pla_serve.server.settings import ServerSettings
from pla_serve.server.tools.support import ToolSupport
from pla_serve.wire.engine import EngineReady, Grammar

GrammarCheck = Callable[[Grammar, str], Awaitable[None]]
"""Given a grammar and its tenant. Raises ValueError with what is wrong with the grammar, or
`TooManyChecks`."""


@dataclass(frozen=True, slots=True)
class Service:
    """Objects that the endpoints use."""

    settings: ServerSettings
    engine: Backend
    token_bytes: TokenBytes
    encoder: PromptEncoder
    names: TokenNames
    metrics: Metrics
    check_grammar: GrammarCheck
    tools: ToolSupport
    reasoning: ReasoningSupport
    defaults: SamplingDefaults
    """Sampling parameters of requests that give none."""
    embeddings: EmbeddingModel
    """How the model makes vectors of texts."""
    journal: Journal
    started: int
    """Unix seconds, for the list of models."""

    def model_name(self, asked: str | None) -> str:
        """Return the name that a request asks for; the first one if it names none.

        Raises:
            ApiError: 404, this server has no model of that name.
        """
        names = self.settings.model_names
        if asked is None:
            return names[0]
        if asked not in names:
            raise ApiError(
                404,
                f"the model {asked[:200]!r} does not exist; this server has {', '.join(names)}",
                code="model_not_found",
                param="model",
            )
        return asked

    async def ready_engine(self) -> EngineReady:
        """Wait for the engine, and return what it can do.

        Raises:
            ApiError: 503, it is not ready within ``settings.restart_wait`` seconds.
        """
        try:
            return await self.engine.wait_ready(self.settings.restart_wait)
        except EngineUnavailableError as error:
            raise unavailable(str(error), error.retry_after) from None
