"""``/tokenize`` and ``/detokenize``, with the fields and answers that vLLM has."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from starlette.requests import Request
from starlette.responses import Response

from pla_serve.server.api.body import BodyReader, Upload, validate
from pla_serve.server.api.generations import client_of
from pla_serve.server.api.messages import MAX_MESSAGES
from pla_serve.server.api.schema import ChatRequest, all_ints
from pla_serve.server.api.service import Service
from pla_serve.server.api.strict import Strict, refuse, wrong
from pla_serve.server.api.tool_schema import MAX_TOOLS
from pla_serve.server.errors import ApiError, invalid, json_response

CONTEXTS = 4
"""Texts of up to so many contexts are tokenised: clients do this to cut what is too long."""
MOST_TOKENS = 250_000
"""Most tokens of one request, unless the context itself is longer."""
CHAT_ONLY = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


def _read_tokens(value: object) -> list[int]:
    if not isinstance(value, list) or not all_ints(value):
        raise ValueError("give a list of token ids")
    return value


class TokenizeRequest(Strict):
    """A text (``prompt``) or a conversation (``messages``)."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Any], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    """Messages as chat takes them; like `tools`, they are checked as part of a `ChatRequest`."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its own (BOS): true for a text, false for a conversation."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Any], Field(max_length=MAX_TOOLS)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise wrong("prompt", "give either prompt or messages")
        given = [name for name in CHAT_ONLY if name in self.model_fields_set]
        if self.prompt is not None and given:
            raise refuse(given[0], f"{given[0]} needs messages")
        return self

    def chat(self) -> ChatRequest:
        """Return the conversation as a chat request.

        Raises:
            ApiError: 400, the messages are none that chat would take.
        """
        names = ("messages", "add_special_tokens", *CHAT_ONLY)
        fields = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        return validate(
            {name: value for name, value in fields.items() if value is not None}, ChatRequest
        )


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[
        list[int],
        PlainValidator(_read_tokens),
        WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}}),
    ]


class TokenEndpoints:
    """One method a route, as `Endpoints`. Long texts are worked on in the encoder's threads."""

    def __init__(self, service: Service, bodies: BodyReader) -> None:
        self._service = service
        self._bodies = bodies

    async def tokenize(self, request: Request) -> Response:
        service = self._service
        with self._bodies.upload(client_of(request)) as upload:
            body = await upload.read_json(request, TokenizeRequest)
            service.model_name(body.model)
            context = (await service.ready_engine()).max_model_len
            tokens = await self._encode(body, upload, most_tokens(context))
            spellings = await service.encoder.spellings(tokens) if body.return_token_strs else None
            answer = {
                "count": len(tokens),
                "max_model_len": context,
                "tokens": tokens,
                "token_strs": spellings,
            }
            return await upload.run(lambda: json_response(answer))

    async def detokenize(self, request: Request) -> Response:
        service = self._service
        with self._bodies.upload(client_of(request)) as upload:
            body = await upload.read_json(request, DetokenizeRequest)
            service.model_name(body.model)
            info = await service.ready_engine()
            most = most_tokens(info.max_model_len)
            if len(body.tokens) > most:
                raise invalid(f"at most {most} tokens, not {len(body.tokens)}", "tokens")
            tokens = await service.encoder.tokens(
                body.tokens, vocab_size=info.vocab_size, limit=most, param="tokens"
            )
            text = await service.encoder.detokenize(tokens)
            return await upload.run(lambda: json_response({"prompt": text}))

    async def _encode(self, body: TokenizeRequest, upload: Upload, most: int) -> list[int]:
        encoder = self._service.encoder
        try:
            if body.prompt is None:
                chat = await upload.run(body.chat)
                return (await encoder.chat(chat, limit=most, size=upload.size)).tokens
            special = body.add_special_tokens is not False
            return await encoder.text(body.prompt, limit=most, add_special_tokens=special)
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            name = "messages" if body.prompt is None else "prompt"
            message = f"more than {most} tokens, the most of one request here; send it in parts"
            raise invalid(message, name, error.code) from None


def most_tokens(context: int) -> int:
    """Return the most tokens of one request, for a model with so many tokens of context."""
    return max(context, min(CONTEXTS * context, MOST_TOKENS))
