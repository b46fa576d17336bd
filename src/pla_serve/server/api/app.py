"""The ASGI application: routes, error handlers, and what stands before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from pla_serve import __version__
from pla_serve.server.api.direct import Direct
from pla_serve.server.api.endpoints import Endpoints, Service
from pla_serve.server.api.errors import ApiError, failed, invalid, json_response
from pla_serve.server.api.guard import Guard, Keys, Traffic
from pla_serve.server.api.schema import ChatRequest, CompletionRequest

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is at fault, or comes at a bad time (429)."},
    "503": {"description": "The engine is not up; see Retry-After."},
}
REFERENCES = "#/components/schemas/{model}"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def build_app(
    service: Service, traffic: Traffic, extend: Callable[[FastAPI], None] = lambda app: None
) -> ASGIApp:
    """``extend`` adds routes of its own."""
    app = FastAPI(title="PLA-Serve", version=__version__)
    endpoints = Endpoints(service)
    _add_errors(app)
    _add_api(app, endpoints)
    _add_operations(app, service, traffic)
    _describe_bodies(app, ChatRequest, CompletionRequest)
    extend(app)
    direct = Direct(app, {CHAT: endpoints.chat, COMPLETIONS: endpoints.complete})
    return Guard(direct, Keys(service.settings.api_keys), traffic)


def _add_api(app: FastAPI, endpoints: Endpoints) -> None:
    @app.post(CHAT, responses=ERRORS, openapi_extra=_body(ChatRequest), tags=["OpenAI"])
    async def create_chat_completion(request: Request) -> Response:
        """Answers a conversation, whole or as server-sent events."""
        return await endpoints.chat(request)

    @app.post(
        COMPLETIONS, responses=ERRORS, openapi_extra=_body(CompletionRequest), tags=["OpenAI"]
    )
    async def create_completion(request: Request) -> Response:
        """Continues texts or token lists, whole or as server-sent events."""
        return await endpoints.complete(request)

    @app.get("/v1/models", tags=["OpenAI"])
    async def list_models(request: Request) -> Response:
        return await endpoints.models(request)

    @app.get("/v1/models/{model:path}", responses=ERRORS, tags=["OpenAI"])
    async def get_model(model: str, request: Request) -> Response:
        return await endpoints.model(request)


def _add_operations(app: FastAPI, service: Service, traffic: Traffic) -> None:
    @app.get("/health", tags=["operations"])
    async def health() -> Response:
        """The server is alive; says nothing of the engine."""
        return json_response({"status": "alive"})

    @app.get("/ready", responses={"503": {"description": "Not now."}}, tags=["operations"])
    async def ready() -> Response:
        """200 only if a request would be served now."""
        if traffic.draining:
            return json_response({"status": "draining"}, 503)
        if not service.engine.is_ready:
            return json_response({"status": service.engine.status}, 503)
        return json_response({"status": "ready"})

    @app.get("/version", tags=["operations"])
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        answer = ApiError(error.status_code, str(error.detail)).response()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def bad_path(request: Request, error: RequestValidationError) -> Response:
        return invalid("the path or query is not valid").response()

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return failed("internal error; the server's log says more").response()


def _body(model: type[BaseModel]) -> dict[str, Any]:
    """Bodies are read by `read_json`, so the description has to be told what they are."""
    schema = {"$ref": REFERENCES.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe_bodies(app: FastAPI, *models: type[BaseModel]) -> None:
    """Adds the schemas of the bodies to the OpenAPI document when it is first asked for."""
    plain = app.openapi

    def with_bodies() -> dict[str, Any]:
        document = plain()
        _, schemas = models_json_schema(
            [(model, "validation") for model in models], ref_template=REFERENCES
        )
        found = document.setdefault("components", {}).setdefault("schemas", {})
        found.update(schemas["$defs"])
        return document

    app.openapi = with_bodies  # type: ignore[method-assign]
