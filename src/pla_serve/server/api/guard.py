"""Middleware before the endpoints: API keys, draining, and clients that disconnect."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pla_serve.logs import request_id
from pla_serve.server.api.anthropic.errors import is_anthropic, respond
from pla_serve.server.errors import ApiError, unavailable
from pla_serve.server.records.metrics import Metrics

log = logging.getLogger(__name__)

TENANT = "pla_serve.tenant"
"""Key of the tenant's name in the ASGI scope."""

WARNING = "pla_serve.warning"
"""Key of what `warn` has said."""

OFFLINE_WORK = "pla_serve.offline"
"""Key that is in the scope of a line of an offline batch. No client can set it."""

METRICS = "/metrics"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
SERVED = ("/v1/", TOKENIZE, DETOKENIZE)
"""Begins of the paths that API keys open, and whose requests a drain waits for."""

ID = re.compile(r"[!-~]{1,128}")
"""Request ids that are taken over: printable, and no longer than anybody needs."""


def tenant_name(place: int) -> str:
    """Return the name of the owner of the API key at this place in the server's list."""
    return f"key-{place}"


class Keys:
    """API keys, compared in constant time. Without any, every client is admitted."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [self._digest(key.encode()) for key in keys]

    def admit(self, authorization: bytes | None) -> str | None:
        """Return the tenant that an ``Authorization`` header proves, or None if there is none.

        The name does not reveal the key. On a server without keys it is empty.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        offered = self._digest(key.strip())
        # All are compared, so that the time does not tell which one matched.
        matches = [hmac.compare_digest(offered, digest) for digest in self._digests]
        return tenant_name(matches.index(True)) if any(matches) else None

    @staticmethod
    def _digest(key: bytes) -> bytes:
        return hashlib.sha256(key).digest()


class Traffic:
    """Counts the requests that are being served, and refuses new ones while draining.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.draining = False
        self.ending = False
        """Whether the process will end in any case, as after SIGTERM."""
        self._ends_at: float | None = None
        self._clock = clock
        self._in_flight = 0
        self._metrics = metrics
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def ends_in(self) -> float | None:
        """Seconds until the server ends, as far as it has been told; None if it has not."""
        return None if self._ends_at is None else max(0.0, self._ends_at - self._clock())

    def change(self, by: int) -> None:
        self._in_flight += by
        self._metrics.set("pla_serve:http_requests_in_flight", self._in_flight)
        if self._in_flight:
            self._idle.clear()
        else:
            self._idle.set()

    def give_notice(self, seconds: float) -> None:
        """Refuse new requests from now on, because the server will end in so many seconds."""
        self.draining = True
        self._ends_at = self._clock() + seconds

    def withdraw_notice(self) -> None:
        """Take requests again."""
        self.draining = False
        self._ends_at = None

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests for good, and wait for the running ones.

        Returns whether all have ended within ``seconds``.
        """
        self.ending = True
        self.give_notice(seconds)
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class Guard:
    """ASGI middleware. A request whose client disconnects is cancelled, wherever it is."""

    def __init__(self, app: ASGIApp, keys: Keys, traffic: Traffic, scrapers: Keys) -> None:
        """``scrapers``: keys that read the metrics, which tell of all users."""
        self._app = app
        self._keys = keys
        self._traffic = traffic
        self._scrapers = scrapers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith((*SERVED, METRICS)):
            await self._app(scope, receive, send)
            return
        send = name_answers(scope, send)
        serves = scope["path"].startswith(SERVED)
        keys = self._keys if serves else self._scrapers
        who = admitted(keys, scope)
        if who is None:
            refusal = ApiError(401, "wrong or missing API key", code="invalid_api_key")
            await respond(refusal, scope["path"])(scope, receive, send)
        elif not serves:
            await self._app(scope, receive, send)
        elif self._traffic.draining:
            refusal = unavailable("the server is shutting down", 5.0)
            await respond(refusal, scope["path"])(scope, receive, send)
        else:
            scope[TENANT] = who
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._traffic.change(+1)
        try:
            await run_while_connected(self._app, scope, receive, send)
        finally:
            self._traffic.change(-1)


def admitted(keys: Keys, scope: Scope) -> str | None:
    """Return the tenant that a request proves with a bearer token, or in ``x-api-key``.

    The latter is how Anthropic's clients send keys; None if neither is right.
    """
    headers = dict(scope["headers"])
    who = keys.admit(headers.get(b"authorization"))
    if who is None and b"x-api-key" in headers:
        who = keys.admit(b"Bearer " + headers[b"x-api-key"])
    return who


def name_answers(scope: Scope, send: Send) -> Send:
    """Give the request an id, the client's own if it is usable, and send it with the answer.

    Anthropic's clients look for it in ``request-id``.
    """
    names = [b"x-request-id", *([b"request-id"] if is_anthropic(scope["path"]) else [])]
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    id = given if ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
    request_id.set(id)

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            value = id.encode("latin-1")
            headers = [*message.get("headers", ()), *((name, value) for name in names)]
            if WARNING in scope:
                headers.append((b"warning", f'299 pla-serve "{scope[WARNING]}"'.encode("latin-1")))
            message = {**message, "headers": headers}
        await send(message)

    return named


def warn(scope: Scope, text: str) -> None:
    """Have the answer to a request carry a warning.

    Args:
        text: ASCII without quotes, and nothing that a client has chosen.
    """
    scope[WARNING] = text


def tenant(scope: Scope) -> str:
    """Return the tenant that makes this request, as `Keys.admit` named it."""
    who: str = scope.get(TENANT, "")
    return who


async def run_while_connected(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run ``app`` until it is done, or cancel it when the client disconnects."""
    inbox: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)
    task = asyncio.ensure_future(app(scope, inbox.get, send))

    async def pump() -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                task.cancel()
                return
            await inbox.put(message)

    pumping = asyncio.ensure_future(pump())
    try:
        await asyncio.wait({task})
    finally:
        # Also when the server itself cancels this request on its way out.
        pumping.cancel()
        task.cancel()
    if not task.cancelled():
        task.result()
