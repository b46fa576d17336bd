"""Reads the prompt of a request that passes by: its tokens, whose it is, when it is due."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from itertools import chain

from pla_serve.server.api.anthropic.schema import MessagesRequest
from pla_serve.server.api.anthropic.translate import chat_request as of_messages
from pla_serve.server.api.body import BodyReader, Upload, validate
from pla_serve.server.api.cache_scope import CacheScopes
from pla_serve.server.api.guard import Keys
from pla_serve.server.api.responses.schema import ResponsesRequest
from pla_serve.server.api.responses.translate import chat_request as of_response
from pla_serve.server.api.schema import ChatRequest, CompletionRequest
from pla_serve.server.api.service import Service
from pla_serve.server.bounded_json import decode
from pla_serve.server.errors import ApiError
from pla_serve.wire.engine import EngineReady

log = logging.getLogger(__name__)

Headers = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PickedPrompt:
    """The part of a request that decides where it goes."""

    tokens: list[int]
    """The tokens of all its prompts, one prompt after the other."""
    tenant: str
    cache_scope: str
    ttft_slo: float | None
    """Seconds from now until the first token is due; None: as soon as may be."""


class PromptReader:
    """Makes tokens of bodies, as the endpoints of the API do.

    What it cannot read has no prompt here and goes to some instance, which says what is wrong.

    Args:
        service: of the router's API, whose tokenizer and chat template are used.
        bodies: bounds the bodies that are being read.
    """

    def __init__(self, service: Service, bodies: BodyReader) -> None:
        settings = service.settings
        self._service = service
        self._bodies = bodies
        self._keys = Keys(settings.api_keys)
        self._scopes = CacheScopes(settings.api_keys, shared=settings.share_prefix_cache)
        self._readers: Mapping[str, Callable[[Upload, bytes], Awaitable[_Read]]] = {
            "/v1/completions": self._completion,
            "/v1/chat/completions": self._chat,
            "/v1/messages": self._messages,
            "/v1/responses": self._response,
        }

    @property
    def most_bytes(self) -> int:
        """Largest body that is read."""
        return self._bodies.max_body_bytes

    def reads(self, headers: Headers) -> bool:
        """Whether a request with these headers has a prompt in its body."""
        return _path(headers) in self._readers and headers.get(":method") == "POST"

    @property
    def body_seconds(self) -> float:
        """Longest time in which a body must have come."""
        return self._bodies.limits.body_seconds

    def upload(self, headers: Headers) -> Upload:
        """Return the account of a request's body, from its first byte to its decision."""
        return self._bodies.upload(self._tenant(headers) or "")

    async def read(self, headers: Headers, upload: Upload, body: bytes) -> PickedPrompt | None:
        """Return the prompt of a request; None if it has none that an instance would take.

        Args:
            headers: by name in lower case, with Envoy's ``:path`` and ``:method``.
            upload: has counted the bytes of ``body``.

        Raises:
            ApiError: 503, no instance has told the limits of prompts yet.
        """
        tenant = self._tenant(headers)
        reader = self._readers.get(_path(headers))
        if reader is None or tenant is None:
            return None  # without a key that is known the instance refuses
        try:
            found = await reader(upload, body)
        except ApiError as error:
            if error.status in (429, 503):
                raise
            log.debug("a body without a prompt: %s", error)
            return None
        if not found.tokens:
            return None
        scope = self._scopes.of(tenant, found.cache_salt)
        slo = found.ttft_slo_ms
        return PickedPrompt(found.tokens, tenant, scope, slo / 1000 if slo else None)

    def _tenant(self, headers: Headers) -> str | None:
        who = self._keys.admit(headers.get("authorization", "").encode("latin-1", "replace"))
        if who is None and "x-api-key" in headers:
            who = self._keys.admit(b"Bearer " + headers["x-api-key"].encode("latin-1", "replace"))
        return who

    def _info(self) -> EngineReady:
        """Return the limits of prompts.

        Raises:
            ApiError: 503, no instance has told it yet.
        """
        info = self._service.engine.info
        if info is None:
            raise ApiError(503, "no instance is ready", retry_after=5.0)
        return info

    async def _completion(self, upload: Upload, data: bytes) -> _Read:
        body = await upload.run(lambda: validate(decode(data), CompletionRequest))
        info = self._info()
        prompts = await self._service.encoder.several(
            body.prompt,
            vocab_size=info.vocab_size,
            limit=info.max_model_len,
            special=body.add_special_tokens,
        )
        return _Read(list(chain.from_iterable(prompts)), body.cache_salt, body.ttft_slo_ms)

    async def _chat(self, upload: Upload, data: bytes) -> _Read:
        body = await upload.run(lambda: validate(decode(data), ChatRequest))
        return await self._rendered(upload, body)

    async def _messages(self, upload: Upload, data: bytes) -> _Read:
        reasoning = self._service.reasoning
        body = await upload.run(
            lambda: of_messages(validate(decode(data), MessagesRequest), reasoning)
        )
        return await self._rendered(upload, body)

    async def _response(self, upload: Upload, data: bytes) -> _Read:
        body = await upload.run(
            lambda: of_response(validate(decode(data), ResponsesRequest), before=[])
        )
        return await self._rendered(upload, body)

    async def _rendered(self, upload: Upload, body: ChatRequest) -> _Read:
        limit = self._info().max_model_len
        prompt = await self._service.encoder.chat(body, limit=limit, size=upload.size)
        return _Read(prompt.tokens, body.cache_salt, body.ttft_slo_ms)


@dataclass(frozen=True, slots=True)
class _Read:
    tokens: list[int]
    cache_salt: str | None
    ttft_slo_ms: float | None


def _path(headers: Headers) -> str:
    return headers.get(":path", "").partition("?")[0]
