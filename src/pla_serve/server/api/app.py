"""The ASGI application of a server: its operations, and what stands before them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from pla_serve import __version__
from pla_serve.server.api.anthropic.endpoints import MessageEndpoints
from pla_serve.server.api.anthropic.schema import CountTokensRequest, MessagesRequest
from pla_serve.server.api.body import BodyReader
from pla_serve.server.api.cross_origin import CrossOrigin
from pla_serve.server.api.drain import drain_operations
from pla_serve.server.api.embeddings.endpoints import EmbeddingEndpoints
from pla_serve.server.api.embeddings.operations import embedding_operations
from pla_serve.server.api.endpoints import Endpoints
from pla_serve.server.api.generations import Generations
from pla_serve.server.api.guard import DETOKENIZE, TOKENIZE, Guard, Keys, Traffic
from pla_serve.server.api.link_access import LinkAccess, operator_keys
from pla_serve.server.api.openapi import openapi, page
from pla_serve.server.api.responses.background import BackgroundRuns
from pla_serve.server.api.responses.endpoints import ResponsesEndpoints
from pla_serve.server.api.responses.operations import response_operations
from pla_serve.server.api.responses.store import ResponseStore
from pla_serve.server.api.routes import Api, ApiRoute, Operation
from pla_serve.server.api.schema import ChatRequest, CompletionRequest
from pla_serve.server.api.service import Service
from pla_serve.server.api.tokenize import DetokenizeRequest, TokenEndpoints, TokenizeRequest
from pla_serve.server.errors import json_response

ERRORS = {
    "4XX": "The request is at fault, or comes at a bad time (429).",
    "503": "The engine is not up; see Retry-After.",
}


def build_app(
    service: Service,
    traffic: Traffic,
    more: Sequence[ApiRoute] = (),
    pages: Sequence[Operation] = (),
) -> ASGIApp:
    """Return the application of a server.

    Args:
        more: routes beside those that all servers have.
        pages: routes for browsers, which ``/openapi.json`` does not describe.
    """
    settings = service.settings
    bodies = BodyReader(settings.max_body_bytes, settings.limits)
    generations = Generations(service)
    routes = [
        *_openai(Endpoints(service, bodies, generations)),
        *embedding_operations(EmbeddingEndpoints(service, bodies, generations), ERRORS),
        *response_operations(_responses(service, bodies, generations, traffic)),
        *_anthropic(MessageEndpoints(service, bodies, generations)),
        *_tokens(TokenEndpoints(service, bodies)),
        *_operations(service, traffic),
        *drain_operations(traffic, bodies, LinkAccess(settings.link_key, settings.api_keys)),
        *more,
    ]
    described = [each for each in routes if isinstance(each, Operation)]
    api = Api([*routes, *pages, *_descriptions(described)])
    scrapers = [*settings.api_keys, *filter(None, [settings.metrics_key])]
    may_scrape = operator_keys(settings.link_key, scrapers) or Keys(())
    guard = Guard(api, Keys(settings.api_keys), traffic, may_scrape)
    return CrossOrigin(guard, settings.cors_origins) if settings.cors_origins else guard


def _responses(
    service: Service, bodies: BodyReader, generations: Generations, traffic: Traffic
) -> ResponsesEndpoints:
    limits = service.settings.limits
    store = ResponseStore(
        limits.max_stored_responses,
        limits.max_stored_response_bytes,
        limits.stored_response_seconds,
        time.monotonic,
    )
    background = BackgroundRuns(traffic, limits.max_background_responses)
    return ResponsesEndpoints(service, bodies, generations, store, background)


def _openai(endpoints: Endpoints) -> list[Operation]:
    return [
        Operation(
            "POST",
            "/v1/chat/completions",
            endpoints.chat,
            "Answers a conversation, whole or as server-sent events.",
            "OpenAI",
            ChatRequest,
            ERRORS,
        ),
        Operation(
            "POST",
            "/v1/completions",
            endpoints.complete,
            "Continues texts or token lists, whole or as server-sent events.",
            "OpenAI",
            CompletionRequest,
            ERRORS,
        ),
        Operation("GET", "/v1/models", endpoints.models, "Names of the model.", "OpenAI"),
        Operation(
            "GET",
            "/v1/models/{model:path}",
            endpoints.model,
            "One of the names of the model.",
            "OpenAI",
            answers=ERRORS,
        ),
    ]


def _anthropic(endpoints: MessageEndpoints) -> list[Operation]:
    return [
        Operation(
            "POST",
            "/v1/messages",
            endpoints.create,
            "Answers a conversation in Anthropic's words, whole or as server-sent events.",
            "Anthropic",
            MessagesRequest,
            ERRORS,
        ),
        Operation(
            "POST",
            "/v1/messages/count_tokens",
            endpoints.count_tokens,
            "Counts the tokens of such a conversation.",
            "Anthropic",
            CountTokensRequest,
            ERRORS,
        ),
    ]


def _tokens(endpoints: TokenEndpoints) -> list[Operation]:
    return [
        Operation(
            "POST",
            TOKENIZE,
            endpoints.tokenize,
            "Token ids of a text or a conversation.",
            "tokens",
            TokenizeRequest,
            ERRORS,
        ),
        Operation(
            "POST",
            DETOKENIZE,
            endpoints.detokenize,
            "Text of token ids.",
            "tokens",
            DetokenizeRequest,
            ERRORS,
        ),
    ]


def _operations(service: Service, traffic: Traffic) -> list[Operation]:
    async def health(request: Request) -> Response:
        return json_response({"status": "alive"})

    async def ready(request: Request) -> Response:
        if traffic.draining:
            return json_response({"status": "draining"}, 503)
        if not service.engine.is_ready:
            return json_response({"status": service.engine.status}, 503)
        return json_response({"status": "ready"})

    async def version(request: Request) -> Response:
        return json_response({"version": __version__})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return [
        Operation("GET", "/health", health, "The server is alive; says nothing of the engine."),
        Operation(
            "GET",
            "/ready",
            ready,
            "200 only if a request would be served now.",
            answers={"503": "Not now."},
        ),
        Operation("GET", "/version", version, "Version of the server."),
        Operation("GET", "/metrics", metrics, "Metrics as Prometheus text."),
    ]


def _descriptions(operations: Sequence[Operation]) -> list[Operation]:
    """Operations that describe the others: a document for programs, and a page for people."""
    document, text = openapi(operations), page(operations)

    async def describe(request: Request) -> Response:
        return json_response(document)

    async def show(request: Request) -> Response:
        return HTMLResponse(text)

    return [
        Operation("GET", "/openapi.json", describe, "This description."),
        Operation("GET", "/docs", show, "The operations, for people."),
    ]
