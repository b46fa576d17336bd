"""Formats of an answer: chat completions and text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pla_serve.server.api.logprobs import (
    TextOffsets,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
)
from pla_serve.wire.engine import FinishReason, TokenLogprob

Json = dict[str, Any]


class ChoicePart:
    """Part of one choice, or all of it, before it is turned into JSON."""

    __slots__ = ("finish_reason", "index", "logprobs", "stop_reason", "text", "tokens")

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None


class Format(Protocol):
    """Turns parts of choices into JSON. Each answer has its own object, which may keep counts."""

    object: str
    chunk_object: str

    def opening(self, index: int) -> Json | None:
        """Return the ``choice`` that a stream sends before the first text; None for none."""

    def chunks(self, piece: ChoicePart) -> Sequence[Json]:
        """Return the ``choice`` objects that a stream sends for a part of a choice."""

    def whole(self, piece: ChoicePart) -> Json: ...


class ChatFormat:
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, names: TokenNames, *, logprobs: bool) -> None:
        self._names = names
        self._wants_logprobs = logprobs

    def opening(self, index: int) -> Json:
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def chunks(self, piece: ChoicePart) -> Sequence[Json]:
        choice = {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        return (choice,)

    def whole(self, piece: ChoicePart) -> Json:
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def _logprobs(self, piece: ChoicePart) -> Json | None:
        if not self._wants_logprobs:
            return None
        return {"content": chat_logprobs(piece.tokens, piece.logprobs, self._names)}


class CompletionFormat:
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, names: TokenNames, *, logprobs: bool, echoes: Sequence[str], n: int) -> None:
        """``echoes`` has the text that the choices of each prompt begin with, or is empty."""
        self._names = names
        self._wants_logprobs = logprobs
        self._echoes = echoes
        self._n = n
        self._offsets: dict[int, TextOffsets] = {}

    def opening(self, index: int) -> Json | None:
        if not self._echoes:
            return None
        return {
            "index": index,
            "text": self._echoes[index // self._n],
            "logprobs": None,
            "finish_reason": None,
        }

    def chunks(self, piece: ChoicePart) -> Sequence[Json]:
        choice = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        return (choice,)

    def whole(self, piece: ChoicePart) -> Json:
        echo = self._echoes[piece.index // self._n] if self._echoes else ""
        return {
            "index": piece.index,
            "text": echo + piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def _logprobs(self, piece: ChoicePart) -> Json | None:
        if not self._wants_logprobs:
            return None
        offsets = self._offsets.setdefault(piece.index, TextOffsets(self._names))
        return completion_logprobs(piece.tokens, piece.logprobs, self._names, offsets)
