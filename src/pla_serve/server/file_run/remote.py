"""An OpenAI-compatible server that answers the lines of a run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec

from pla_serve.server.offline.caller import Answered
from pla_serve.server.offline.lines import LineRequest

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 3600.0
"""Longest time for one answer."""
PATIENCE_SECONDS = 60.0
"""How long a run goes on trying a server that accepts no connections."""
REFUSED = (401, 403)


class ServerGone(OSError):
    """The server cannot be reached, or does not let this key in."""


class RemoteServer:
    """Talks to one server. Belongs to one event loop.

    Args:
        client: its base URL is the server's, without ``/v1``.
    """

    def __init__(self, client: httpx.AsyncClient, patience: float = PATIENCE_SECONDS) -> None:
        self._client = client
        self._patience = patience

    async def keeps_batches(self) -> bool:
        """Return whether the server has ``/v1/batches``.

        Raises:
            ServerGone: it cannot be reached, or refuses the key.
        """
        models = await self.ask("GET", "/v1/models")
        if models.status_code in REFUSED:
            raise ServerGone(f"{self._client.base_url} refuses the key; give --api-key")
        found = await self.ask("GET", "/v1/batches", params={"limit": 1})
        try:
            return found.status_code == 200 and isinstance(found.json()["data"], list)
        except (ValueError, KeyError, TypeError):
            return False

    async def send(self, request: LineRequest, id: str) -> Answered:
        """Send the request of one line.

        Raises:
            ServerGone: there is no server any more.
        """
        headers = {"content-type": "application/json", "x-request-id": id}
        try:
            found = await self.ask("POST", request.endpoint, content=request.body, headers=headers)
        except httpx.TransportError as error:
            return _failed(f"the server did not answer: {error or type(error).__name__}")
        try:
            msgspec.json.decode(found.content)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return _failed(f"the server answered {found.status_code} with what is not JSON")
        return Answered(found.status_code, found.content, _seconds(found))

    async def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send any request; one for which there is no connection is sent again for a while.

        Raises:
            ServerGone: no connection could be made.
            httpx.TransportError: there was one, and it broke.
        """
        pause, waited = 1.0, 0.0
        while True:
            try:
                return await self._client.request(method, path, **request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if waited >= self._patience:
                    address = self._client.base_url
                    raise ServerGone(f"no connection to {address}: {error}") from None
            await asyncio.sleep(pause)
            waited, pause = waited + pause, min(2 * pause, 10.0)


@asynccontextmanager
async def remote_server(base_url: str, api_key: str | None) -> AsyncIterator[RemoteServer]:
    """Yield the server at a URL, which may end in ``/v1``.

    Raises:
        ValueError: it is no URL.
    """
    try:
        url = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as error:
        raise ValueError(f"--base-url {base_url}: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"--base-url is like http://127.0.0.1:8000, not {base_url!r}")
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
    bounds = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=timeout, limits=bounds, trust_env=False
    ) as client:
        yield RemoteServer(client)


def _failed(message: str) -> Answered:
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    return Answered(502, msgspec.json.encode({"error": error}), None)


def _seconds(answer: httpx.Response) -> float | None:
    try:
        return float(answer.headers["retry-after"])
    except (KeyError, ValueError):  # a date is allowed as well
        return None
