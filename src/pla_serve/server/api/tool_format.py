"""Chat completions whose answers may have tool calls."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pla_serve.server.api.formats import ChatFormat, ChoicePart, Json
from pla_serve.server.api.logprobs import TokenNames
from pla_serve.server.tools.events import (
    AnswerEvent,
    AnswerReader,
    AnswerText,
    CallArguments,
    CallBegins,
    Reasoning,
)
from pla_serve.wire.engine import FinishReason


@dataclass(slots=True)
class StreamedChoice:
    """One choice of a stream: its reader, and log probabilities that no chunk has had yet."""

    reader: AnswerReader
    held: ChoicePart
    calls: int = 0


class ToolChatFormat(ChatFormat):
    """Reads calls out of the text of each choice.

    Args:
        make_reader: returns a fresh reader, for one choice.
        parallel: False to leave out all calls of a choice but the first.
    """

    def __init__(
        self,
        names: TokenNames,
        *,
        logprobs: bool,
        scored_prompt: Sequence[int] | None,
        make_reader: Callable[[], AnswerReader],
        parallel: bool,
    ) -> None:
        super().__init__(names, logprobs=logprobs, scored_prompt=scored_prompt)
        self._make_reader = make_reader
        self._parallel = parallel
        self._choices: dict[int, StreamedChoice] = {}

    def chunks(self, piece: ChoicePart) -> Sequence[Json]:
        choice = self._choices.get(piece.index)
        if choice is None:
            choice = StreamedChoice(self._make_reader(), ChoicePart(piece.index))
            self._choices[piece.index] = choice
        events = choice.reader.push(piece.text)
        if piece.finish_reason is not None:
            events += choice.reader.finish()
        choice.held.tokens += piece.tokens
        choice.held.logprobs += piece.logprobs
        deltas = [_delta(event) for event in self._wanted(events)]
        choice.calls += sum(isinstance(event, CallBegins) for event in events)
        if piece.finish_reason is not None:
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
            chunk["finish_reason"] = _finish(piece.finish_reason, choice.calls)
            chunk["stop_reason"] = piece.stop_reason
        return chunk

    def whole(self, piece: ChoicePart) -> Json:
        reader = self._make_reader()
        content, reasoning, calls = "", "", list[Json]()
        for event in self._wanted([*reader.push(piece.text), *reader.finish()]):
            if isinstance(event, AnswerText):
                content += event.text
            elif isinstance(event, Reasoning):
                reasoning += event.text
            elif isinstance(event, CallBegins):
                calls.append(_call(event))
            else:
                calls[event.index]["function"]["arguments"] += event.text
        message: Json = {
            "role": "assistant",
            "content": sound(content) if content.strip() or not calls else None,
            "refusal": None,
        }
        if reasoning:
            message["reasoning_content"] = sound(reasoning)
        if calls:
            message["tool_calls"] = [_sound_call(call) for call in calls]
        return {
            "index": piece.index,
            "message": message,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason and _finish(piece.finish_reason, len(calls)),
            "stop_reason": piece.stop_reason,
        }

    def _wanted(self, events: Iterable[AnswerEvent]) -> Iterable[AnswerEvent]:
        for event in events:
            index = event.index if isinstance(event, CallBegins | CallArguments) else 0
            if self._parallel or index == 0:
                yield event


def _finish(reason: FinishReason, calls: int) -> str:
    return "tool_calls" if reason == "stop" and calls else reason


def _call(event: CallBegins) -> Json:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }


def _sound_call(call: Json) -> Json:
    function = {name: sound(text) for name, text in call["function"].items()}
    return {**call, "function": function}


def _delta(event: AnswerEvent) -> Json:
    if isinstance(event, AnswerText):
        return {"content": sound(event.text)}
    if isinstance(event, Reasoning):
        return {"reasoning_content": sound(event.text)}
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
