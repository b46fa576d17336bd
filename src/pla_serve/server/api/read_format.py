"""Writes chat completions whose answers may have reasoning and tool calls."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from pla_serve.server.api.choice_reading import ChoiceReading, Reading
from pla_serve.server.api.formats import ChatFormat, ChoicePart, Json
from pla_serve.server.api.logprobs import TokenNames
from pla_serve.server.tools.events import (
    AnswerEvent,
    AnswerText,
    CallBegins,
    Reasoning,
)
from pla_serve.wire.engine import FinishReason


@dataclass(slots=True)
class StreamedChoice:
    """One choice of a stream: its reading, and log probabilities that no chunk has had yet."""

    reading: ChoiceReading
    held: ChoicePart


class ReadChatFormat(ChatFormat):
    """Reads reasoning and calls out of the text of each choice.

    Reasoning has two names, ``reasoning_content`` and ``reasoning``, because clients know either.
    """

    def __init__(
        self,
        names: TokenNames,
        *,
        logprobs: bool,
        scored_prompt: Sequence[int] | None,
        reading: Reading,
    ) -> None:
        super().__init__(names, logprobs=logprobs, scored_prompt=scored_prompt)
        self._reading = reading
        self._choices: dict[int, StreamedChoice] = {}
        self._reasoning_tokens = 0

    def reasoning_tokens(self) -> int | None:
        if self._reading.make_counter is None:
            return None
        streamed = sum(each.reading.reasoning_tokens for each in self._choices.values())
        return self._reasoning_tokens + streamed

    def chunks(self, piece: ChoicePart) -> Sequence[Json]:
        choice = self._choices.get(piece.index)
        if choice is None:
            choice = StreamedChoice(ChoiceReading(self._reading), ChoicePart(piece.index))
            self._choices[piece.index] = choice
        last = piece.finish_reason is not None
        choice.held.tokens += piece.tokens
        choice.held.logprobs += piece.logprobs
        deltas = [
            _delta(event) for event in choice.reading.push(piece.text, piece.tokens, last=last)
        ]
        if last:
            deltas.append({})
        return [self._chunk(choice, piece, delta, delta is deltas[-1]) for delta in deltas]

    def _chunk(self, choice: StreamedChoice, piece: ChoicePart, delta: Json, last: bool) -> Json:
        chunk: Json = {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(choice.held),
            "finish_reason": None,
        }
        choice.held = ChoicePart(piece.index)
        if last and piece.finish_reason is not None:
            chunk["finish_reason"] = _finish(piece.finish_reason, choice.reading.calls)
            chunk["stop_reason"] = piece.stop_reason
        return chunk

    def whole(self, piece: ChoicePart) -> Json:
        reading = ChoiceReading(self._reading)
        content, reasoning, calls = "", "", list[Json]()
        for event in reading.push(piece.text, piece.tokens, last=True):
            if isinstance(event, AnswerText):
                content += event.text
            elif isinstance(event, Reasoning):
                reasoning += event.text
            elif isinstance(event, CallBegins):
                calls.append(_call(event))
            else:
                calls[event.index]["function"]["arguments"] += event.text
        self._reasoning_tokens += reading.reasoning_tokens
        message: Json = {
            "role": "assistant",
            "content": sound(content) if content.strip() or not (calls or reasoning) else None,
            "refusal": None,
        }
        if reasoning:
            message |= _reasoning(reasoning)
        if calls:
            message["tool_calls"] = [_sound_call(call) for call in calls]
        return {
            "index": piece.index,
            "message": message,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason and _finish(piece.finish_reason, len(calls)),
            "stop_reason": piece.stop_reason,
        }


def _finish(reason: FinishReason, calls: int) -> str:
    return "tool_calls" if reason == "stop" and calls else reason


def _call(event: CallBegins) -> Json:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }


def _reasoning(text: str) -> Json:
    text = sound(text)
    return {"reasoning_content": text, "reasoning": text}


def _sound_call(call: Json) -> Json:
    function = {name: sound(text) for name, text in call["function"].items()}
    return {**call, "function": function}


def _delta(event: AnswerEvent) -> Json:
    if isinstance(event, AnswerText):
        return {"content": sound(event.text)}
    if isinstance(event, Reasoning):
        return _reasoning(event.text)
    if isinstance(event, CallBegins):
        return {"tool_calls": [{"index": event.index, **_sound_call(_call(event))}]}
    arguments = {"arguments": sound(event.text)}
    return {"tool_calls": [{"index": event.index, "function": arguments}]}


def sound(text: str) -> str:
    r"""Return ``text`` as UTF-8 can hold it; a model may write half a character as ``"\ud83d"``."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
