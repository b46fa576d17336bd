"""``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from pla_serve.server.api.anthropic.answer import MessageAnswer, encoded
from pla_serve.server.api.anthropic.errors import error_body
from pla_serve.server.api.anthropic.schema import CountTokensRequest, MessagesRequest
from pla_serve.server.api.anthropic.translate import chat_request
from pla_serve.server.api.body import BodyReader
from pla_serve.server.api.choice_reading import Reading
from pla_serve.server.api.event_stream import EventStream
from pla_serve.server.api.generations import Asked, ChatRun, Generations, client_of, new_id
from pla_serve.server.api.service import Service
from pla_serve.server.api.tokenize import most_tokens
from pla_serve.server.errors import json_response
from pla_serve.server.reasoning.reader import TextReader


class MessageEndpoints:
    """Methods that answer the routes, one for each. They raise `ApiError` for failures."""

    def __init__(self, service: Service, bodies: BodyReader, generations: Generations) -> None:
        self._service = service
        self._bodies = bodies
        self._generations = generations

    async def create(self, request: Request) -> Response:
        arrival = time.monotonic()
        service = self._service
        with self._bodies.upload(client_of(request)) as upload:
            asked = Asked(request, upload, arrival)
            body = await upload.read_json(request, MessagesRequest)
            model = service.model_name(body.model)
            chat = await upload.run(lambda: chat_request(body, service.reasoning))
            run = await self._generations.chat(asked, chat, new_id("msg"), cut_to_fit=True)
            return await self._answer(asked, body, run, model)

    async def count_tokens(self, request: Request) -> Response:
        service = self._service
        with self._bodies.upload(client_of(request)) as upload:
            body = await upload.read_json(request, CountTokensRequest)
            service.model_name(body.model)
            most = most_tokens((await service.ready_engine()).max_model_len)
            chat = await upload.run(lambda: chat_request(body, service.reasoning))
            prompt = await service.encoder.chat(chat, limit=most, size=upload.size)
            return json_response({"input_tokens": len(prompt.tokens)})

    async def _answer(
        self, asked: Asked, body: MessagesRequest, run: ChatRun, model: str
    ) -> Response:
        settings = self._service.settings
        generation = self._generations.start(asked.request, run.plan)
        streams = False
        try:
            await generation.admit()
            asked.upload.release()
            reading = run.reading or Reading(TextReader)
            answer = MessageAnswer(generation, reading, id=run.plan.id, model=model)
            if not body.stream:
                return json_response(await answer.whole())
            streams = True
        finally:
            if not streams:
                generation.close()
        return EventStream(
            answer.events(settings.keep_alive_seconds),
            on_end=generation.close,
            stall_seconds=settings.stall_seconds,
            write_error=lambda error: encoded(error_body(error)),
        )
