"""Operations of the HTTP API: one declaration each, from which route and description follow.

A response passes through no framework between its handler and the server: each layer around a
response costs more for every message of a stream than a token does. `Api` finds the operation with
Starlette's router, turns errors into answers, and lets the handler's response write to the server
itself.

Example::

    async def version(request: Request) -> Response:
        return json_response({"version": "1"})

    app = Api([Operation("GET", "/version", version, "Version of the server.")])
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router, WebSocketRoute
from starlette.types import Receive, Scope, Send

from pla_serve.server.api.anthropic.errors import respond
from pla_serve.server.api.guard import Keys
from pla_serve.server.errors import ApiError, failed

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
"""Returns the response, or raises `ApiError`."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one path."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    """As Starlette has it: ``/v1/models/{model:path}``."""
    handler: Handler
    summary: str
    tag: str = "operations"
    body: type[BaseModel] | None = None
    """Model of the JSON body. The handler reads the body itself, with `read_json`."""
    answers: Mapping[str, str] = field(default_factory=dict)
    """Descriptions of answers other than 200, by status."""
    keys: Keys | None = None
    """Keys of which one must be sent; None: whoever comes so far may ask."""


ApiRoute = Operation | WebSocketRoute


class Api:
    """ASGI application of operations, and of WebSockets such as links to routers."""

    def __init__(self, routes: Sequence[ApiRoute]) -> None:
        self._router = Router(
            [
                each
                if isinstance(each, WebSocketRoute)
                else Route(each.path, _Endpoint(each), methods=[each.method], name=each.path)
                for each in routes
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # Starlette's router then raises for unknown paths and methods
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            response = respond(ApiError(error.status_code, error.detail), scope["path"])
            response.headers.update(error.headers or {})
            await response(scope, receive, send)


class _Endpoint:
    """ASGI application of one operation."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(Request(scope, receive))
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        try:
            self._admit(request)
            return await self._operation.handler(request)
        except ApiError as error:
            return respond(error, request.url.path)
        except Exception:
            log.exception("a request failed")
            fault = failed("internal error; the server's log says more")
            return respond(fault, request.url.path)

    def _admit(self, request: Request) -> None:
        keys = self._operation.keys
        if keys is None:
            return
        if keys.admit(request.headers.get("authorization", "").encode("latin-1")) is None:
            raise ApiError(401, "wrong or missing API key", code="invalid_api_key")
