"""Writes the answer of one request: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from pla_serve.server.api.formats import ChoicePart, Format, Json
from pla_serve.server.api.schema import StreamOptions
from pla_serve.server.errors import ApiError
from pla_serve.server.generation.generation import ChoiceDelta, Generation

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
LONG = 10_000
"""Tokens of an answer above which it is read and encoded in a thread."""
LOGPROB_COST = 10
"""Tokens that take as long to encode as the log probabilities of one."""
ECHO_PER_TOKEN = 64
"""Characters of an echo that take as long to encode as a token, or less."""


@dataclass(frozen=True, slots=True)
class Header:
    """Fields that every chunk of one answer repeats."""

    id: str
    created: int
    model: str
    service_tier: str | None = None
    """Name of the request's tier, where the request or the server speaks of tiers."""

    def shown(self, kind: str) -> Json:
        """Return the fields that come first, with what ``kind`` of object it is."""
        first = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return first if self.service_tier is None else {**first, "service_tier": self.service_tier}


async def whole(generation: Generation, form: Format, header: Header) -> Json:
    """Run a generation to its end, and return the answer as one JSON object.

    Raises:
        ApiError: the generation failed.
    """
    pieces: dict[int, ChoicePart] = {}
    async with aclosing(generation.deltas()) as answer:
        async for deltas in answer:
            for delta in deltas:
                _add(pieces, delta)
    choices = await _choices(form, [pieces[index] for index in sorted(pieces)])
    return {**header.shown(form.object), **choices, "usage": usage(generation, form)}


async def _choices(form: Format, pieces: list[ChoicePart]) -> Json:
    """Return ``choices`` and what goes beside them; a long answer is encoded in a thread."""

    def fields() -> Json:
        return {"choices": [form.whole(piece) for piece in pieces], **form.beside(pieces[0])}

    def encode() -> Json:
        return {name: msgspec.Raw(msgspec.json.encode(each)) for name, each in fields().items()}

    if sum(map(_cost, pieces)) + form.repeated // ECHO_PER_TOKEN < LONG:
        return fields()
    return await asyncio.to_thread(encode)


def _cost(piece: ChoicePart | ChoiceDelta) -> int:
    """Return the tokens that take as long to encode as this part of an answer."""
    scores = len(piece.prompt_logprobs) if piece.prompt_logprobs is not None else 0
    return len(piece.tokens) + LOGPROB_COST * (len(piece.logprobs) + scores)


def usage(generation: Generation, form: Format) -> Json:
    """Return the tokens of an answer so far; those of reasoning if the model has reasoning."""
    found = generation.usage()
    reasoning = form.reasoning_tokens()
    if reasoning is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return found


class EventWriter:
    """Turns deltas into events.

    A delta without text is kept, with its log probabilities, until text follows.
    """

    def __init__(
        self, generation: Generation, form: Format, header: Header, options: StreamOptions | None
    ) -> None:
        self._generation = generation
        self._form = form
        self._options = options or StreamOptions()
        self._encode = msgspec.json.Encoder().encode
        self._opened: set[int] = set()
        self._held: dict[int, ChoicePart] = {}
        self._frame: Json = {**header.shown(form.chunk_object), "choices": []}
        if self._options.include_usage:
            self._frame["usage"] = None

    async def events(
        self, keep_alive: float, clock: Callable[[], float] = time.monotonic
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes to send; a comment after ``keep_alive`` seconds without any.

        A failure becomes an event with an error and ends the stream, without ``[DONE]``.
        """
        sent = clock()
        try:
            async with aclosing(self._generation.deltas(keep_alive)) as answer:
                async for deltas in answer:
                    block = await self._block(deltas)
                    if not block and clock() - sent >= keep_alive:
                        block = KEEP_ALIVE
                    if block:
                        sent = clock()
                        yield block
        except ApiError as error:
            yield self._event(error.body())
            return
        yield self._ending()

    async def _block(self, deltas: list[ChoiceDelta]) -> bytes:
        """Return the events of some deltas; those of a long scored prompt are made in a thread."""
        if any(delta.prompt_logprobs is not None and _cost(delta) >= LONG for delta in deltas):
            return await asyncio.to_thread(lambda: b"".join(map(self._write, deltas)))
        return b"".join(map(self._write, deltas))

    def _write(self, delta: ChoiceDelta) -> bytes:
        piece = _add(self._held, delta)
        if not piece.text and piece.finish_reason is None:
            return b""
        del self._held[delta.index]
        block = b""
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            opening = self._form.opening(delta.index)
            if opening is not None:
                block = self._chunk(opening)
        return block + b"".join(map(self._chunk, self._form.chunks(piece)))

    def _chunk(self, choice: Json) -> bytes:
        frame = self._frame
        frame["choices"] = [choice]
        if self._options.continuous_usage_stats:
            frame["usage"] = usage(self._generation, self._form)
        return self._event(frame)

    def _ending(self) -> bytes:
        if not self._options.include_usage:
            return DONE
        last = {"choices": [], "usage": usage(self._generation, self._form)}
        return self._event({**self._frame, **last}) + DONE

    def _event(self, content: Any) -> bytes:
        return b"data: " + self._encode(content) + b"\n\n"


def _add(pieces: dict[int, ChoicePart], delta: ChoiceDelta) -> ChoicePart:
    piece = pieces.get(delta.index)
    if piece is None:
        piece = pieces[delta.index] = ChoicePart(delta.index)
    piece.text += delta.text
    piece.tokens += delta.tokens
    piece.logprobs += delta.logprobs
    if delta.prompt_logprobs is not None:
        piece.prompt_logprobs = delta.prompt_logprobs
    piece.finish_reason = delta.finish_reason
    piece.stop_reason = delta.stop_reason
    return piece
