"""Embeddings, and scores and rankings by them: prefills without decode steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from pla_serve.server.api.body import BodyReader
from pla_serve.server.api.embeddings.schema import (
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    VectorRequest,
)
from pla_serve.server.api.embeddings.vectors import UnitVectors, cosines, ranked, shown, unit
from pla_serve.server.api.formats import Json
from pla_serve.server.api.generations import Asked, Generations, client_of, new_id
from pla_serve.server.api.schema import CompletionRequest
from pla_serve.server.api.service import Service
from pla_serve.server.errors import ApiError, failed, json_response, unsupported
from pla_serve.server.generation.generation import Generation

SHARED = {"cache_salt", "priority", "service_tier", "ttft_slo_ms"}
"""Fields that mean the same as in a completion."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors of the inputs of one request, and what they cost."""

    vectors: UnitVectors
    tokens: int

    @property
    def usage(self) -> Json:
        """Usage as OpenAI shows it."""
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens}


class EmbeddingEndpoints:
    """Methods that answer the routes, one for each. They raise `ApiError` for failures."""

    def __init__(self, service: Service, bodies: BodyReader, generations: Generations) -> None:
        self._service = service
        self._bodies = bodies
        self._generations = generations

    async def embed(self, request: Request) -> Response:
        """Answer ``/v1/embeddings``."""
        arrival = time.monotonic()
        with self._bodies.upload(client_of(request)) as upload:
            asked = Asked(request, upload, arrival)
            body = await upload.read_json(request, EmbeddingRequest)
            model = self._service.model_name(body.model)
            self._check_dimensions(body.dimensions)
            special = body.add_special_tokens
            found = await self._embed(asked, body, body.input, special, body.dimensions)

        def answer() -> Json:
            rows = shown(found.vectors, body.encoding_format)
            data = [
                {"object": "embedding", "index": index, "embedding": row}
                for index, row in enumerate(rows)
            ]
            return {"object": "list", "data": data, "model": model, "usage": found.usage}

        return await _in_thread(answer)

    async def score(self, request: Request) -> Response:
        """Answer ``/v1/score``."""
        arrival = time.monotonic()
        with self._bodies.upload(client_of(request)) as upload:
            asked = Asked(request, upload, arrival)
            body = await upload.read_json(request, ScoreRequest)
            model = self._service.model_name(body.model)
            found = await self._embed(asked, body, [*body.text_1, *body.text_2])

        def answer() -> Json:
            first = len(body.text_1)
            data = [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(cosines(found.vectors[:first], found.vectors[first:]))
            ]
            return {
                "id": new_id("score"),
                "object": "list",
                "created": int(time.time()),
                "model": model,
                "data": data,
                "usage": found.usage,
            }

        return await _in_thread(answer)

    async def rerank(self, request: Request) -> Response:
        """Answer ``/v1/rerank``."""
        arrival = time.monotonic()
        with self._bodies.upload(client_of(request)) as upload:
            asked = Asked(request, upload, arrival)
            body = await upload.read_json(request, RerankRequest)
            model = self._service.model_name(body.model)
            texts = body.texts
            found = await self._embed(asked, body, [body.query, *texts])

        def answer() -> Json:
            scores = cosines(found.vectors[:1], found.vectors[1:])
            results = [
                {"index": place, "relevance_score": scores[place]}
                | ({"document": {"text": texts[place]}} if body.return_documents else {})
                for place in ranked(scores, body.top_n)
            ]
            return {
                "id": new_id("rerank"),
                "model": model,
                "results": results,
                "usage": found.usage,
            }

        return await _in_thread(answer)

    async def _embed(
        self,
        asked: Asked,
        body: VectorRequest,
        inputs: list[str | list[int]] | list[str],
        special: bool = True,
        size: int | None = None,
    ) -> Embedded:
        """Return the vectors of some inputs, each cut to ``size`` numbers and of length 1.

        Raises:
            ApiError: the model makes none, an input does not fit, or the engine refuses or fails.
        """
        made = self._service.embeddings
        if made.refusal is not None:
            raise ApiError(400, f"this model makes no embeddings here: {made.refusal}")
        info = await self._service.ready_engine()
        prompts = await self._service.encoder.several(
            inputs, vocab_size=info.vocab_size, limit=info.max_model_len, special=special
        )
        shared = body.model_dump(include=SHARED)
        as_completion = CompletionRequest.model_validate(
            {"prompt": [[]], "max_tokens": 0, "temperature": 0.0, **shared}
        )
        plan = await self._generations.plan(asked, as_completion, new_id("embd"), prompts, info)
        sampling = [msgspec.structs.replace(each, embedding=made.pooling) for each in plan.sampling]
        generation = self._generations.start(asked.request, replace(plan, sampling=sampling))
        try:
            await generation.admit()
            asked.upload.release()
            rows = await _collect(generation)
        finally:
            generation.close()
        vectors = await asyncio.to_thread(lambda: unit(np.stack(rows), size))
        if size is not None and size > vectors.shape[1]:
            raise unsupported("dimensions", f"the vectors of this model have {vectors.shape[1]}")
        return Embedded(vectors, generation.prompt_tokens)

    def _check_dimensions(self, asked: int | None) -> None:
        """Raises:
        ApiError: the model was not trained to have its vectors cut, or not to this size.
        """
        sizes = self._service.embeddings.dimensions
        if asked is None or sizes is None or asked in sizes:
            return
        which = f"; it was to {', '.join(map(str, sizes))}" if sizes else ""
        raise unsupported(
            "dimensions", f"this model was not trained to have its vectors cut to {asked}{which}"
        )


async def _collect(generation: Generation) -> list[NDArray[np.float32]]:
    """Return the vectors of all prompts, in their order."""
    found: dict[int, bytes] = {}
    async with aclosing(generation.deltas()) as answer:
        async for deltas in answer:
            for delta in deltas:
                if delta.embedding is None:
                    raise failed("the engine made no embedding: is it of another version?", 502)
                found[delta.index] = delta.embedding
    return [np.frombuffer(found[index], "<f4") for index in sorted(found)]


async def _in_thread(answer: Callable[[], Json]) -> Response:
    """Return the response of a body that takes long to write: 256 vectors are megabytes."""
    return await asyncio.to_thread(lambda: json_response(answer()))
