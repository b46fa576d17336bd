"""The endpoints: what happens to a request from its body to its answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pla_serve.logs import request_id
from pla_serve.server.api.answer import EventWriter, Header, whole
from pla_serve.server.api.body import BodyReader, Upload
from pla_serve.server.api.cache_scope import CacheScopes
from pla_serve.server.api.event_stream import EventStream
from pla_serve.server.api.formats import ChatFormat, CompletionFormat, Format
from pla_serve.server.api.guard import tenant
from pla_serve.server.api.logprobs import TokenNames
from pla_serve.server.api.params import check_held_logprobs, sampling_params
from pla_serve.server.api.prompts import PromptEncoder
from pla_serve.server.api.schema import (
    MAX_SEQUENCES,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from pla_serve.server.api.tool_constraint import Check, with_tool_grammar
from pla_serve.server.api.tool_format import ToolChatFormat
from pla_serve.server.engine.backend import Backend, EngineUnavailableError
from pla_serve.server.errors import (
    ApiError,
    invalid,
    json_response,
    over_capacity,
    too_long,
    unavailable,
)
from pla_serve.server.generation.detokenize import TokenBytes
from pla_serve.server.generation.generation import Generation, GenerationPlan
from pla_serve.server.generation.grammar_checks import TooManyChecks
from pla_serve.server.records.journal import Journal, JournalEntry
from pla_serve.server.records.metrics import Metrics
from pla_serve.server.records.tracing import TRACE_HEADERS
from pla_serve.server.settings import ServerSettings
from pla_serve.server.tools.support import ToolSupport
from pla_serve.wire.engine import EngineReady, Grammar

COMPLETION_TOKENS = 16
"""Default max_tokens of /v1/completions, as OpenAI and vLLM have it."""

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


class Endpoints:
    """One method a route. Answers are ready responses, errors are raised as `ApiError`."""

    def __init__(self, service: Service, bodies: BodyReader) -> None:
        self._service = service
        settings = service.settings
        self._bodies = bodies
        self._cache_scopes = CacheScopes(settings.api_keys, shared=settings.share_prefix_cache)

    async def chat(self, request: Request) -> Response:
        arrival = time.monotonic()
        service = self._service
        with self._bodies.upload(client_of(request)) as upload:
            body = await upload.read_json(request, ChatRequest)
            model = self._service.model_name(body.model)
            info = await self._service.ready_engine()
            prompt = await service.encoder.chat(body, limit=info.max_model_len, size=upload.size)
            header = self._header("chatcmpl", model)
            limit, scope = body.output_limit, self._cache_scope(request, body)
            plan = await upload.run(
                lambda: self._plan(body, header.id, arrival, [prompt], limit, info, scope)
            )
            use = body.tool_use()
            form: Format = ChatFormat(service.names, logprobs=bool(body.logprobs))
            if use is not None:
                plan = replace(plan, keep_special=service.tools.keep)
                check = self._checker(request, "tools")
                plan = await with_tool_grammar(plan, use, service.tools, check)
                form = ToolChatFormat(
                    service.names,
                    logprobs=bool(body.logprobs),
                    make_reader=service.tools.reader(use),
                    parallel=use.parallel,
                )
            elif (grammar := plan.sampling[0].grammar) is not None:
                await self._checker(request)(grammar)
            return await self._answer(request, upload, body, plan, form, header)

    async def complete(self, request: Request) -> Response:
        arrival = time.monotonic()
        service = self._service
        with self._bodies.upload(client_of(request)) as upload:
            body = await upload.read_json(request, CompletionRequest)
            model = self._service.model_name(body.model)
            info = await self._service.ready_engine()
            prompts = await self._prompts(body, info)
            header = self._header("cmpl", model)
            limit = body.max_tokens or COMPLETION_TOKENS
            scope = self._cache_scope(request, body)
            plan = await upload.run(
                lambda: self._plan(body, header.id, arrival, prompts, limit, info, scope)
            )
            echoes = await service.encoder.texts(body.prompt) if body.echo else []
            wants = body.logprobs is not None
            if (grammar := plan.sampling[0].grammar) is not None:
                await self._checker(request)(grammar)
            form = CompletionFormat(service.names, logprobs=wants, echoes=echoes, n=plan.n)
            return await self._answer(request, upload, body, plan, form, header)

    async def models(self, request: Request) -> Response:
        names = self._service.settings.model_names
        return json_response({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        return json_response(self._card(self._service.model_name(request.path_params["model"])))

    async def _answer(
        self,
        request: Request,
        upload: Upload,
        body: ChatRequest | CompletionRequest,
        plan: GenerationPlan,
        form: Format,
        header: Header,
    ) -> Response:
        service, settings = self._service, self._service.settings
        session = service.engine.session(settings.max_unread_tokens, tenant(request.scope))
        trace = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}
        entry = JournalEntry(request_id.get() or plan.id, plan.arrival, trace)
        generation = Generation(
            plan, session, service.token_bytes, service.metrics, entry, service.journal
        )
        streams = False
        try:
            await generation.admit()
            upload.release()
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

    def _cache_scope(self, request: Request, body: GenerationRequest) -> str:
        return self._cache_scopes.of(tenant(request.scope), body.cache_salt)

    def _plan(
        self,
        body: ChatRequest | CompletionRequest,
        id: str,
        arrival: float,
        prompts: list[list[int]],
        max_tokens: int | None,
        info: EngineReady,
        cache_scope: str,
    ) -> GenerationPlan:
        n = body.n or 1
        if body.priority and not self._service.settings.enable_priority:
            raise invalid(
                "priorities are not enabled on this server: leave out priority, or start the "
                "server with --enable-priority",
                "priority",
            )
        if len(prompts) * n > MAX_SEQUENCES:
            raise invalid(f"at most {MAX_SEQUENCES} choices in one request, over all prompts", "n")
        limits = [output_limit(len(each), max_tokens, info.max_model_len) for each in prompts]
        shared = sampling_params(body, min(limits), info.vocab_size)
        check_held_logprobs(body, shared.logprobs, n * sum(limits))
        sampling = [msgspec.structs.replace(shared, max_tokens=limit) for limit in limits]
        return GenerationPlan(
            id=id,
            prompts=prompts,
            sampling=sampling,
            n=n,
            arrival=arrival,
            ttft_slo=body.ttft_slo_ms / 1000 if body.ttft_slo_ms else None,
            priority=body.priority,
            cache_scope=cache_scope,
            stop=body.stop,
            include_stop=body.include_stop_str_in_output,
            skip_special=body.skip_special_tokens,
        )

    async def _prompts(self, body: CompletionRequest, info: EngineReady) -> list[list[int]]:
        """Tokens of all prompts. Others get their turn between two of them."""
        encoder, limit, found = self._service.encoder, info.max_model_len, []
        for item in body.prompt:
            if isinstance(item, list):
                tokens = await encoder.tokens(item, vocab_size=info.vocab_size, limit=limit)
            else:
                special = body.add_special_tokens
                tokens = await encoder.text(item, limit=limit, add_special_tokens=special)
            found.append(tokens)
            if len(body.prompt) > 1:
                await asyncio.sleep(0)
        return found

    def _checker(self, request: Request, param: str = "response_format") -> Check:
        """Return the check of grammars of this client; ``param`` is what errors name."""
        who = client_of(request)

        async def check(grammar: Grammar) -> None:
            try:
                await self._service.check_grammar(grammar, who)
            except ValueError as error:
                raise invalid(f"the constraint cannot be used: {error}", param) from None
            except TooManyChecks as error:
                raise over_capacity(str(error), 1.0) from None

        return check

    def _header(self, prefix: str, model: str) -> Header:
        return Header(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)

    def _card(self, name: str) -> dict[str, Any]:
        info = self._service.engine.info
        return {
            "id": name,
            "object": "model",
            "created": self._service.started,
            "owned_by": "pla-serve",
            "root": self._service.settings.model_root,
            "parent": None,
            "max_model_len": info.max_model_len if info else None,
        }


def client_of(request: Request) -> str:
    """Whom uploads are charged to: the API key's owner, or an address where there are no keys."""
    address = request.client.host if request.client else ""
    return tenant(request.scope) or address


def output_limit(prompt: int, asked: int | None, context: int) -> int:
    """How many tokens a prompt of so many may make.

    Raises:
        ApiError: an empty prompt, or one that leaves too little of the context.
    """
    if prompt == 0:
        raise invalid("the prompt is empty", "prompt")
    if prompt >= context:
        raise too_long(prompt, context)
    if asked is not None and prompt + asked > context:
        raise too_long(prompt, context, output=asked)
    return asked or context - prompt
