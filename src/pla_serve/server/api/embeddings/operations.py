"""Operations for embeddings and scores."""

from __future__ import annotations

from collections.abc import Mapping

from pla_serve.server.api.embeddings.endpoints import EmbeddingEndpoints
from pla_serve.server.api.embeddings.schema import EmbeddingRequest, RerankRequest, ScoreRequest
from pla_serve.server.api.routes import Operation

EMBEDDINGS, SCORE, RERANK = "/v1/embeddings", "/v1/score", "/v1/rerank"


def embedding_operations(
    endpoints: EmbeddingEndpoints, errors: Mapping[str, str]
) -> list[Operation]:
    """Return the operations; ``errors`` describes answers other than 200, by status."""
    return [
        Operation(
            "POST",
            EMBEDDINGS,
            endpoints.embed,
            "Vectors of texts or token lists, of length 1.",
            "OpenAI",
            EmbeddingRequest,
            errors,
        ),
        Operation(
            "POST",
            SCORE,
            endpoints.score,
            "Cosines of the vectors of pairs of texts, as vLLM has it.",
            "embeddings",
            ScoreRequest,
            errors,
        ),
        Operation(
            "POST",
            RERANK,
            endpoints.rerank,
            "Documents in the order of their cosines with a query, as Jina has it.",
            "embeddings",
            RerankRequest,
            errors,
        ),
    ]
