"""Operations of the page: its files, which hold no data, and the events that it shows."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.resources import files
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pla_serve import __version__
from pla_serve.server.api.event_stream import EventStream
from pla_serve.server.api.guard import Keys, Traffic, run_while_connected
from pla_serve.server.api.routes import Operation
from pla_serve.server.api.service import Service
from pla_serve.server.errors import ApiError, unavailable
from pla_serve.server.page.feed import PageFeed, TooManyWatchersError

INDEX = "index.html"
TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
"""Sent with each file. Scripts are files of this server, and none can make HTML of a text."""


class PageView(Protocol):
    """Source of what the page shows beyond the server itself: its engine, or its fleet."""

    @property
    def boundary_tokens(self) -> int:
        """Most new tokens of a short request; 0 if it is not known."""

    def describe(self) -> dict[str, Any]:
        """Return the state, JSON-ready, in well under 20 ms."""


def page_operations(service: Service, traffic: Traffic, view: PageView) -> list[Operation]:
    """Return the routes below ``/ui``. The events ask for an API key where the server has any."""
    feed = _feed(service, traffic, view)

    async def events(request: Request) -> Response:
        if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise ApiError(403, "only the page of this server may watch it")
        if traffic.draining:
            raise unavailable("the server is shutting down", 5.0)
        try:
            feed.join()
        except TooManyWatchersError:
            raise unavailable("too many watch this server already; close a page", 15.0) from None
        return WatcherStream(
            _events(feed, traffic),
            on_end=feed.leave,
            stall_seconds=service.settings.stall_seconds,
        )

    watch = Operation(
        "GET",
        "/ui/events",
        events,
        "State of the server as server-sent events.",
        keys=Keys(service.settings.api_keys),
    )
    folder = files("pla_serve.server.page") / "static"
    known = [each for each in folder.iterdir() if _ending(each.name) in TYPES]
    return [watch, *(_file(each.name, each.read_bytes()) for each in known)]


class WatcherStream(EventStream):
    """An event stream that ends as soon as its client has gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_while_connected(super().__call__, scope, receive, send)


def _feed(service: Service, traffic: Traffic, view: PageView) -> PageFeed:
    latencies = service.metrics.latencies

    def look() -> dict[str, Any]:
        latencies.boundary_tokens = view.boundary_tokens
        return {
            "version": __version__,
            "model": service.settings.model_names[0],
            "status": "draining" if traffic.draining else service.engine.status,
            "in_flight": traffic.in_flight,
            "boundary_tokens": view.boundary_tokens,
            "latency": latencies.summary(),
            **view.describe(),
        }

    def on_watched(watched: bool) -> None:
        if watched:
            latencies.start()
        else:
            latencies.stop()

    return PageFeed(look, on_watched)


async def _events(feed: PageFeed, traffic: Traffic) -> AsyncGenerator[bytes, None]:
    async with aclosing(feed.samples()) as samples:
        async for sample in samples:
            yield b"event: sample\ndata: " + sample + b"\n\n"
            if traffic.draining:
                return


def _file(name: str, content: bytes) -> Operation:
    path = "/ui" if name == INDEX else f"/ui/{name}"
    kind = TYPES[_ending(name)]

    async def send(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return Operation("GET", path, send, "A file of the page.")


def _ending(name: str) -> str:
    return name.rpartition(".")[2]
