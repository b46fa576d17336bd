"""Answers to web pages of other origins (CORS)."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from pla_serve.server.api.guard import SERVED
from pla_serve.server.cors_origins import ANY

OPEN = ("/health", "/ready", "/version")
EXPOSED = ("x-request-id", "retry-after", "warning")
"""Headers of answers that scripts may read."""
DAY = 24 * 3600


class CrossOrigin:
    """ASGI middleware that lets scripts of some web pages use the API.

    A browser asks first (a preflight), and without the API key, so that is answered before keys are
    looked at. What operators and routers use, such as links, the state of a fleet and metrics, is
    open to no page.

    Args:
        origins: of the pages; ``*`` for all.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._open = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST", "HEAD", "DELETE"),
            allow_headers=(ANY,),
            expose_headers=EXPOSED,
            max_age=DAY,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        opens = scope["type"] == "http" and (
            scope["path"].startswith(SERVED) or scope["path"] in OPEN
        )
        await (self._open if opens else self._app)(scope, receive, send)
