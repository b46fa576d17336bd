"""Log probabilities in the formats of the two APIs."""

from __future__ import annotations

from typing import Any

from pla_serve.engine.messages import TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks."""


class TokenNames:
    """Text and bytes of single tokens, each worked out once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, tuple[str, list[int]]] = {}
        self._byte_level = _byte_alphabet() if _is_byte_level(tokenizer) else {}
        self._added = set(tokenizer.added_tokens_decoder)

    def __getitem__(self, token: int) -> tuple[str, list[int]]:
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._name(token)
        return found

    def _name(self, token: int) -> tuple[str, list[int]]:
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        raw = self._bytes(token)
        return text, list(text.encode() if raw is None else raw)

    def _bytes(self, token: int) -> bytes | None:
        """The bytes of a token that may be a part of a character; None: those of its text."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None or token in self._added:
            return None
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        if self._byte_level and all(char in self._byte_level for char in piece):
            return bytes(self._byte_level[char] for char in piece)
        return None


def chat_logprobs(
    tokens: list[int], logprobs: list[TokenLogprob], names: TokenNames
) -> list[dict[str, Any]]:
    """The ``logprobs.content`` of a chat choice."""
    return [
        {
            **_entry(token, entry.logprob, names),
            "top_logprobs": [_entry(other, value, names) for other, value in entry.top],
        }
        for token, entry in zip(tokens, logprobs, strict=True)
    ]


def completion_logprobs(
    tokens: list[int], logprobs: list[TokenLogprob], names: TokenNames, offset: int
) -> dict[str, Any]:
    """The ``logprobs`` of a completion choice; ``offset`` is where its text begins."""
    texts = [names[token][0] for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [
            # The chosen token is always among them, as OpenAI has it.
            {names[t][0]: _finite(value) for t, value in [(token, entry.logprob), *entry.top]}
            for token, entry in zip(tokens, logprobs, strict=True)
        ],
        "text_offset": offsets,
    }


def _entry(token: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    text, raw = names[token]
    return {"token": text, "logprob": _finite(logprob), "bytes": raw}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: printable ones stand for themselves,
    the others follow from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + index): byte for index, byte in enumerate(others)},
    }
