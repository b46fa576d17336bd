"""The operations of the Responses API."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pla_serve.server.api.body import BodyReader
from pla_serve.server.api.event_stream import EventStream
from pla_serve.server.api.formats import Json
from pla_serve.server.api.generations import Asked, ChatRun, Generations, client_of
from pla_serve.server.api.guard import tenant, warn
from pla_serve.server.api.responses.answer import (
    LARGE,
    LARGE_BODY,
    ResponseFrame,
    ResponseRun,
    ResponseStream,
    encoded,
)
from pla_serve.server.api.responses.background import BackgroundRuns
from pla_serve.server.api.responses.input_list import input_list
from pla_serve.server.api.responses.items import new_item_id
from pla_serve.server.api.responses.schema import ResponsesRequest
from pla_serve.server.api.responses.store import ResponseStore, StoredAnswer, Turn
from pla_serve.server.api.responses.tools import SearchTool
from pla_serve.server.api.responses.translate import chat_request, errors_renamed, read_items
from pla_serve.server.api.service import Service
from pla_serve.server.errors import ApiError, invalid, json_response, unsupported
from pla_serve.server.generation.generation import Generation


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request: who asks, its answer, and the conversation that it continues."""

    tenant: str
    body: ResponsesRequest
    frame: ResponseFrame
    before: Turn | None


class ResponsesEndpoints:
    """Methods that answer the routes, one for each. They raise `ApiError` for failures."""

    def __init__(
        self,
        service: Service,
        bodies: BodyReader,
        generations: Generations,
        store: ResponseStore,
        background: BackgroundRuns,
    ) -> None:
        self._service = service
        self._bodies = bodies
        self._generations = generations
        self._store = store
        self._background = background

    async def create_response(self, request: Request) -> Response:
        arrival = time.monotonic()
        who = tenant(request.scope)
        with self._bodies.upload(client_of(request)) as upload:
            asked = Asked(request, upload, arrival)
            body = await upload.read_json(request, ResponsesRequest)
            model = self._service.model_name(body.model)
            if any(isinstance(tool, SearchTool) for tool in body.tools):
                warn(request.scope, "web_search was not offered: this server runs no tools itself")
            before = self._continued(who, body.previous_response_id)
            if before is not None:
                upload.carry(before.size)
            chat = await upload.run(lambda: chat_request(body, _items(before)))
            id = new_item_id("resp")
            with errors_renamed():
                run = await self._generations.chat(asked, chat, id)
            stored = body.store and self._store.takes(0)
            large = upload.size > LARGE_BODY
            frame = await upload.run(
                lambda: ResponseFrame(id, model, body, run, stored=stored, large=large)
            )
            exchange = Exchange(who, body, frame, before)
            if body.background:
                if not stored:
                    raise invalid("this server keeps no answers", "background")
                self._background.check_room(who)
            return await self._answer(asked, exchange, run)

    async def response(self, request: Request) -> Response:
        who, id = tenant(request.scope), request.path_params["id"]
        if request.query_params.get("stream", "false") != "false":
            raise unsupported("stream", "a stored answer cannot be streamed: ask without stream")
        frame = self._background.get(who, id)
        if frame is not None:
            return await self._begun(frame)
        return _json(self._found(who, id).body)

    async def delete_response(self, request: Request) -> Response:
        who, id = tenant(request.scope), request.path_params["id"]
        await self._background.cancel(who, id)
        if not self._store.delete(who, id):
            raise _unknown(id)
        return json_response({"id": id, "object": "response", "deleted": True})

    async def cancel_response(self, request: Request) -> Response:
        who, id = tenant(request.scope), request.path_params["id"]
        await self._background.cancel(who, id)
        answer = self._found(who, id)
        if not answer.background:
            raise invalid("only an answer in the background can be cancelled", "response_id")
        return _json(answer.body)

    async def input_items(self, request: Request) -> Response:
        who, id = tenant(request.scope), request.path_params["id"]
        answer = self._found(who, id)
        query = dict(request.query_params)
        content = await asyncio.to_thread(lambda: input_list(_inputs(answer), query))
        return json_response(content)

    async def _answer(self, asked: Asked, exchange: Exchange, run: ChatRun) -> Response:
        body, settings = exchange.body, self._service.settings
        generation = self._generations.start(asked.request, run.plan)
        names = None if body.logprobs is None else self._service.names
        answer = ResponseRun(exchange.frame, run, generation, names)
        handed_on = False
        try:
            with errors_renamed():
                await generation.admit()
            asked.upload.release()
            if body.background:
                self._background.start(
                    exchange.tenant,
                    exchange.frame,
                    lambda: self._make(exchange, answer, generation),
                    lambda final: self._settle(exchange, answer, final),
                )
                handed_on = True
                return await self._begun(exchange.frame)
            if not body.stream:
                async for _ in answer.events():
                    pass
                return _json(await self._settle(exchange, answer, answer.whole()))
            handed_on = True
        finally:
            if not handed_on:
                generation.close()
        stream = ResponseStream(
            answer,
            settle=lambda final: self._settle(exchange, answer, final),
        )
        return EventStream(
            stream.events(settings.keep_alive_seconds),
            on_end=generation.close,
            stall_seconds=settings.stall_seconds,
        )

    async def _begun(self, frame: ResponseFrame) -> Response:
        return _json(await encoded(frame.snapshot("in_progress"), large=frame.large))

    async def _make(self, exchange: Exchange, answer: ResponseRun, generation: Generation) -> Json:
        """Make an answer in the background, and return what becomes of it."""
        output = answer.output
        try:
            async for _ in answer.events():
                pass
            return answer.whole()
        except ApiError as error:
            list(output.abandon())
            return exchange.frame.failed(error, output.items)
        except asyncio.CancelledError:
            list(output.abandon())
            return exchange.frame.snapshot("cancelled", output.items)
        finally:
            generation.close()

    async def _settle(self, exchange: Exchange, answer: ResponseRun, final: Json) -> bytes:
        """Return the JSON of an answer that is over, and keep it if it is to be kept."""
        large = exchange.frame.large or answer.logprobs > LARGE
        body = await encoded(final, large=large)
        if not final["store"]:
            return body
        items = await encoded(
            lambda: [*(item.stored() for item in exchange.body.input), *final["output"]],
            large=large,
        )
        kept = StoredAnswer(
            body,
            Turn(exchange.before, items),
            len(exchange.body.input),
            exchange.body.background,
            final["status"] in ("completed", "incomplete"),
        )
        if not self._store.put(exchange.tenant, exchange.frame.id, kept):
            body = await encoded({**final, "store": False}, large=large)
        return body

    def _found(self, who: str, id: str) -> StoredAnswer:
        found = self._store.get(who, id)
        if found is None:
            raise _unknown(id)
        return found

    def _continued(self, who: str, id: str | None) -> Turn | None:
        """Return the turn that a request continues."""
        if id is None:
            return None
        if self._background.get(who, id) is not None:
            raise invalid(f"the response {id!r} is not complete yet", "previous_response_id")
        found = self._store.get(who, id)
        if found is None:
            raise _unknown(id, "previous_response_id", "previous_response_not_found")
        if not found.can_continue:
            raise invalid(f"the response {id!r} did not complete", "previous_response_id")
        return found.turn


def _items(turn: Turn | None) -> Any:
    if turn is None:
        return []
    found: list[Json] = []
    for items in turn.conversation():
        found += msgspec.json.decode(items)
    return read_items(found)


def _inputs(answer: StoredAnswer) -> list[Json]:
    """Return all input of an answer: earlier turns, and its own without the output."""
    *before, last = answer.turn.conversation()
    found: list[Json] = []
    for items in before:
        found += msgspec.json.decode(items)
    return [*found, *msgspec.json.decode(last)[: answer.inputs]]


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _unknown(id: str, param: str = "response_id", code: str | None = None) -> ApiError:
    return ApiError(
        404,
        f"there is no response {id[:200]!r}: it was not stored, has expired, or belongs to another "
        "API key",
        param=param,
        code=code,
    )
