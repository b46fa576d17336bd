"""Answers of ``/v1/messages``: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from pla_serve.server.api.answer import KEEP_ALIVE, LONG
from pla_serve.server.api.anthropic.blocks import BlockWriter, assembled
from pla_serve.server.api.anthropic.errors import error_body
from pla_serve.server.api.choice_reading import ChoiceReading, Reading
from pla_serve.server.api.formats import Json
from pla_serve.server.errors import ApiError
from pla_serve.server.generation.generation import ChoiceDelta, Generation

PING: Json = {"type": "ping"}
NOT_ENDED: Json = {
    "stop_reason": None,
    "stop_sequence": None,
    "stop_details": None,
    "container": None,
}
"""Fields that say why an answer ended, and where its tools ran: never on the server."""


class MessageAnswer:
    """The answer of one generation.

    Args:
        reading: how its text is read.
        id, model: fields of the message.
    """

    def __init__(self, generation: Generation, reading: Reading, *, id: str, model: str) -> None:
        self._generation = generation
        self._reading = ChoiceReading(reading)
        self._counts = reading.make_counter is not None
        self._writer = BlockWriter()
        self._message: Json = {
            "id": id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            **NOT_ENDED,
        }

    async def whole(self) -> Json:
        """Run the generation to its end, and return the message.

        Raises:
            ApiError: the generation failed.
        """
        text, tokens, last = "", list[int](), None
        async with aclosing(self._generation.deltas()) as answer:
            async for deltas in answer:
                for delta in deltas:
                    text += delta.text
                    tokens += delta.tokens
                    last = delta
        assert last is not None

        def content() -> list[Json]:
            events = self._writer.push(self._reading.push(text, tokens, last=True))
            return assembled(events)

        blocks = content() if len(tokens) < LONG else await asyncio.to_thread(content)
        return {
            **self._message,
            "content": blocks,
            **self._ending(last),
            "usage": self._whole_usage(),
        }

    async def events(
        self, keep_alive: float, clock: Callable[[], float] = time.monotonic
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes to send; a ping after ``keep_alive`` seconds without any.

        Before the message begins, a comment stands for the ping. A failure becomes an event and
        ends the stream.
        """
        sent, begun = clock(), False
        try:
            async with aclosing(self._generation.deltas(keep_alive)) as answer:
                async for deltas in answer:
                    events = [] if begun or not deltas else [self._start()]
                    for delta in deltas:
                        events += self._write(delta)
                    begun = begun or bool(deltas)
                    if not events and clock() - sent >= keep_alive:
                        if not begun:
                            sent = clock()
                            yield KEEP_ALIVE
                            continue
                        events = [PING]
                    if events:
                        sent = clock()
                        yield b"".join(map(encoded, events))
        except ApiError as error:
            yield encoded(error_body(error))

    def _start(self) -> Json:
        message = {**self._message, "usage": {**self._whole_usage(), "output_tokens": 0}}
        return {"type": "message_start", "message": message}

    def _write(self, delta: ChoiceDelta) -> list[Json]:
        last = delta.finish_reason is not None
        events = self._writer.push(self._reading.push(delta.text, delta.tokens, last=last))
        if last:
            ending = {"type": "message_delta", "delta": self._ending(delta), "usage": self._usage()}
            events += [*self._writer.close(), ending, {"type": "message_stop"}]
        return events

    def _ending(self, last: ChoiceDelta) -> Json:
        """Return why the answer ended, and the stop sequence that ended it."""
        if last.finish_reason == "length":
            return {**NOT_ENDED, "stop_reason": "max_tokens"}
        if isinstance(last.stop_reason, str):
            by = last.stop_reason
            return {**NOT_ENDED, "stop_reason": "stop_sequence", "stop_sequence": by}
        reason = "tool_use" if self._reading.calls else "end_turn"
        return {**NOT_ENDED, "stop_reason": reason}

    def _whole_usage(self) -> Json:
        """Return the usage of a message, which has more fields than that of an event."""
        tier = self._generation.plan.tier
        name = "standard" if tier is None else tier.name
        more = {"cache_creation": None, "service_tier": name, "inference_geo": None}
        return {**self._usage(), **more}

    def _usage(self) -> Json:
        found = self._generation.usage()
        cached = found["prompt_tokens_details"]["cached_tokens"]
        usage: Json = {
            "input_tokens": found["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": None,
            "server_tool_use": None,
        }
        if self._counts:
            usage["output_tokens_details"] = {"thinking_tokens": self._reading.reasoning_tokens}
        return usage


def encoded(event: Json) -> bytes:
    """Return the bytes of one event, which has the name of its type."""
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgspec.json.encode(event))
