"""Chat and text completions, and the list of models: from a body to an answer."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pla_serve.server.api.answer import EventWriter, Header, whole
from pla_serve.server.api.anthropic.models import VERSION_HEADER, model_card, model_list
from pla_serve.server.api.body import BodyReader
from pla_serve.server.api.event_stream import EventStream
from pla_serve.server.api.formats import ChatFormat, CompletionFormat, Format
from pla_serve.server.api.generations import Asked, Generations, client_of, new_id
from pla_serve.server.api.params import check_echoes
from pla_serve.server.api.read_format import ReadChatFormat
from pla_serve.server.api.schema import ChatRequest, CompletionRequest
from pla_serve.server.api.service import Service
from pla_serve.server.errors import json_response
from pla_serve.server.generation.generation import GenerationPlan


class Endpoints:
    """Methods that answer the routes, one for each. They raise `ApiError` for failures."""

    def __init__(self, service: Service, bodies: BodyReader, generations: Generations) -> None:
        self._service = service
        self._bodies = bodies
        self._generations = generations

    async def chat(self, request: Request) -> Response:
        arrival = time.monotonic()
        with self._bodies.upload(client_of(request)) as upload:
            asked = Asked(request, upload, arrival)
            body = await upload.read_json(request, ChatRequest)
            header = self._header("chatcmpl", body)
            run = await self._generations.chat(asked, body, header.id)
            names, logprobs = self._service.names, bool(body.logprobs)
            scored = None if body.prompt_logprobs is None else run.plan.prompts[0]
            form: Format = ChatFormat(names, logprobs=logprobs, scored_prompt=scored)
            if run.reading is not None:
                form = ReadChatFormat(
                    names, logprobs=logprobs, scored_prompt=scored, reading=run.reading
                )
            return await self._answer(asked, body, run.plan, form, header)

    async def complete(self, request: Request) -> Response:
        arrival = time.monotonic()
        service = self._service
        with self._bodies.upload(client_of(request)) as upload:
            asked = Asked(request, upload, arrival)
            body = await upload.read_json(request, CompletionRequest)
            header = self._header("cmpl", body)
            info = await service.ready_engine()
            prompts = await service.encoder.several(
                body.prompt,
                vocab_size=info.vocab_size,
                limit=info.max_model_len,
                special=body.add_special_tokens,
            )
            plan = await self._generations.plan(asked, body, header.id, prompts, info)
            echoes = await service.encoder.texts(body.prompt) if body.echo else []
            check_echoes(echoes, plan.n)
            await self._generations.check_grammar(request, plan)
            form = CompletionFormat(
                service.names,
                prompts=prompts,
                logprobs=body.logprobs,
                prompt_logprobs=body.prompt_logprobs,
                echoes=echoes,
                n=plan.n,
                skip_special=plan.skip_special,
            )
            return await self._answer(asked, body, plan, form, header)

    async def models(self, request: Request) -> Response:
        cards = [self._card(name, request) for name in self._service.settings.model_names]
        if VERSION_HEADER in request.headers:
            return json_response(model_list(cards))
        return json_response({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        name = self._service.model_name(request.path_params["model"])
        return json_response(self._card(name, request))

    async def _answer(
        self,
        asked: Asked,
        body: ChatRequest | CompletionRequest,
        plan: GenerationPlan,
        form: Format,
        header: Header,
    ) -> Response:
        settings = self._service.settings
        if body.service_tier is not None or settings.tiers.tiers:
            header = replace(header, service_tier=plan.tier_name)
        generation = self._generations.start(asked.request, plan)
        streams = False
        try:
            await generation.admit()
            asked.upload.release()
            if not body.stream:
                return json_response(await whole(generation, form, header))
            streams = True
        finally:
            if not streams:
                generation.close()
        writer = EventWriter(generation, form, header, body.stream_options)
        return EventStream(
            writer.events(settings.keep_alive_seconds),
            on_end=generation.close,
            stall_seconds=settings.stall_seconds,
        )

    def _header(self, prefix: str, body: ChatRequest | CompletionRequest) -> Header:
        model = self._service.model_name(body.model)
        return Header(new_id(prefix), int(time.time()), model)

    def _card(self, name: str, request: Request) -> dict[str, Any]:
        info = self._service.engine.info
        card = {
            "id": name,
            "object": "model",
            "created": self._service.started,
            "owned_by": "pla-serve",
            "root": self._service.settings.model_root,
            "parent": None,
            "max_model_len": info.max_model_len if info else None,
        }
        return model_card(card) if VERSION_HEADER in request.headers else card
