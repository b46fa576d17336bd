"""Generation, past the web framework, whose layers cost more than a token does."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pla_serve.server.api.errors import ApiError, failed

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


class Direct:
    """ASGI application: POST to some paths goes to their handlers, all else to ``app``.

    A framework passes every message of a response through a handful of wrappers, and a stream has a
    message for each token. ``app`` keeps routes for these paths, to describe them and to refuse
    other methods.
    """

    def __init__(self, app: ASGIApp, handlers: Mapping[str, Handler]) -> None:
        self._app = app
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = None
        if scope["type"] == "http" and scope["method"] == "POST":
            handler = self._handlers.get(scope["path"])
        if handler is None:
            await self._app(scope, receive, send)
            return
        response = await _answer(handler, Request(scope, receive))
        await response(scope, receive, send)


async def _answer(handler: Handler, request: Request) -> Response:
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except Exception:
        log.exception("a request failed")
        return failed("internal error; the server's log says more").response()
