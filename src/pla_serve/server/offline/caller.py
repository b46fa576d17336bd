"""Sends a line of a batch through the server's own application, as if its owner had."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

from pla_serve.server.api.guard import OFFLINE_WORK
from pla_serve.server.offline.lines import LineRequest
from pla_serve.server.offline.owners import Owners


@dataclass(frozen=True, slots=True)
class Answered:
    """Answer of an endpoint.

    Attributes:
        body: JSON text.
        retry_after: seconds, where the endpoint asks for a pause.
    """

    status: int
    body: bytes
    retry_after: float | None


class LineCaller:
    """Calls the application in this process. Lines get the checks, limits and errors of others."""

    def __init__(self, app: ASGIApp, owners: Owners) -> None:
        self._app = app
        self._owners = owners

    async def call(
        self, owner: str, request: LineRequest, request_id: str, *, due: bool = False
    ) -> Answered:
        """POST the request of a line; a cancelled call ends it in the engine.

        Args:
            due: it runs as a request of a client, and not only in time that others leave.
        """
        body, endpoint = request.body, request.endpoint
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", request_id.encode()),
        ]
        key = self._owners.key(owner)
        if key is not None:
            headers.append((b"authorization", b"Bearer " + key.encode()))
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": endpoint,
            "raw_path": endpoint.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("offline", 0),
            "server": None,
        }
        if not due:
            scope[OFFLINE_WORK] = True
        call = _Call(body)
        await self._app(scope, call.receive, call.send)
        return call.answered()


class _Call:
    """The server's side of one request: one body in, one answer out."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()  # the client of a line never leaves
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], dict(message["headers"])
        else:
            self._parts.append(message.get("body", b""))

    def answered(self) -> Answered:
        pause = self._headers.get(b"retry-after")
        return Answered(
            self._status, b"".join(self._parts), None if pause is None else float(pause)
        )
