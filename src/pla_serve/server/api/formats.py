"""Formats of an answer: chat completions and text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pla_serve.server.api.logprobs import (
    TextOffsets,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)
from pla_serve.wire.engine import FinishReason, PromptLogprobs, TokenLogprob

Json = dict[str, Any]


class ChoicePart:
    """Part of one choice, or all of it, before it is turned into JSON."""

    __slots__ = (
        "finish_reason",
        "index",
        "logprobs",
        "prompt_logprobs",
        "stop_reason",
        "text",
        "tokens",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: PromptLogprobs | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None


class Format(Protocol):
    """Turns parts of choices into JSON. Each answer has its own object, which may keep counts."""

    object: str
    chunk_object: str
    repeated: int
    """Characters of prompts that the answer repeats."""

    def opening(self, index: int) -> Json | None:
        """Return the ``choice`` that a stream sends before the first text; None for none."""

    def chunks(self, piece: ChoicePart) -> Sequence[Json]:
        """Return the ``choice`` objects that a stream sends for a part of a choice."""

    def whole(self, piece: ChoicePart) -> Json: ...

    def beside(self, piece: ChoicePart) -> Json:
        """Return fields beside ``choices`` of an answer whose first choice is ``piece``."""

    def reasoning_tokens(self) -> int | None:
        """Return how many tokens so far were reasoning; None for models without."""


class ChatFormat:
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    repeated = 0

    def __init__(
        self, names: TokenNames, *, logprobs: bool, scored_prompt: Sequence[int] | None = None
    ) -> None:
        """``scored_prompt`` has the tokens of the prompt, if their log probabilities are wanted."""
        self._names = names
        self._wants_logprobs = logprobs
        self._scored_prompt = scored_prompt

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

    def beside(self, piece: ChoicePart) -> Json:
        if self._scored_prompt is None or piece.prompt_logprobs is None:
            return {}
        entries = piece.prompt_logprobs.entries()
        scores = prompt_logprobs(self._scored_prompt, entries, self._names)
        return {"prompt_logprobs": scores}

    def reasoning_tokens(self) -> int | None:
        return None

    def _logprobs(self, piece: ChoicePart) -> Json | None:
        if not self._wants_logprobs:
            return None
        content = chat_logprobs(piece.tokens, piece.logprobs, self._names)
        return {"content": content, "refusal": None}


class CompletionFormat:
    """Text completions.

    Args:
        prompts: tokens of each prompt.
        logprobs: likeliest tokens that are wanted in each place of the output, and of the prompt if
            it is echoed; None for no log probabilities.
        prompt_logprobs: the same for those of the prompt in vLLM's form.
        echoes: the text that the choices of each prompt begin with; empty for none.
        n: choices of each prompt.
        skip_special: whether texts leave special tokens out.
    """

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        names: TokenNames,
        *,
        prompts: Sequence[list[int]],
        logprobs: int | None,
        prompt_logprobs: int | None,
        echoes: Sequence[str],
        n: int,
        skip_special: bool,
    ) -> None:
        self._names = names
        self._prompts = prompts
        self._top = logprobs
        self._prompt_top = prompt_logprobs
        self._echoes = echoes
        self.repeated = n * sum(map(len, echoes))
        self._n = n
        self._skip_special = skip_special
        self._offsets: dict[int, TextOffsets] = {}

    def opening(self, index: int) -> Json | None:
        """See `Format`: the echo, unless it comes with log probabilities, in the first chunk."""
        if not self._echoes or self._top is not None:
            return None
        return {
            "index": index,
            "text": self._echoes[index // self._n],
            "logprobs": None,
            "finish_reason": None,
        }

    def chunks(self, piece: ChoicePart) -> Sequence[Json]:
        echo = self._echo(piece) if self._top is not None and not self._begun(piece) else ""
        choice = {
            "index": piece.index,
            "text": echo + piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        return (choice,)

    def whole(self, piece: ChoicePart) -> Json:
        choice = {
            "index": piece.index,
            "text": self._echo(piece) + piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._prompt_top is not None and piece.prompt_logprobs is not None:
            prompt, entries = self._prompt(piece), piece.prompt_logprobs.entries(self._prompt_top)
            choice["prompt_logprobs"] = prompt_logprobs(prompt, entries, self._names)
        return choice

    def beside(self, piece: ChoicePart) -> Json:
        return {}

    def _echo(self, piece: ChoicePart) -> str:
        return self._echoes[piece.index // self._n] if self._echoes else ""

    def _prompt(self, piece: ChoicePart) -> list[int]:
        return self._prompts[piece.index // self._n]

    def _begun(self, piece: ChoicePart) -> bool:
        return piece.index in self._offsets

    def reasoning_tokens(self) -> int | None:
        return None

    def _logprobs(self, piece: ChoicePart) -> Json | None:
        if self._top is None:
            return None
        begun, prompt = self._begun(piece), self._prompt(piece)
        if not begun:
            self._offsets[piece.index] = self._names.offsets(
                prompt, self._echo(piece) if self._echoes else None, self._skip_special
            )
        offsets = self._offsets[piece.index]
        tokens, entries = piece.tokens, list[TokenLogprob | None](piece.logprobs)
        if self._echoes and not begun and piece.prompt_logprobs is not None:
            tokens = [*prompt, *tokens]
            entries = [None, *piece.prompt_logprobs.entries(self._top), *entries]
        return completion_logprobs(tokens, entries, self._names, offsets)
