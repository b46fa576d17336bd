"""Tokens to text as they come: whole characters only, and nothing past a stop string."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pla_serve.grammar.tokenizer import decoder_types

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
MOST_LOOKED_AT = 256
"""Most tokens at the end of a prompt that are searched for text; nearly always the last one has
some."""
_STRAY_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that has become certain with the last tokens."""

    text: str
    stopped_by: str | None = None
    """The stop string that ended the text; what comes after it is dropped."""


class TokenBytes:
    """The bytes that each token of a vocabulary stands for. Share one between detokenizers.

    Byte-level BPE spells bytes as characters; tokenizers in the manner of SentencePiece have
    tokens such as <0xE4> for them. Any other decoder is asked: what a token adds to a text.

    Args:
        tokenizer: a fast ``transformers`` tokenizer or a ``tokenizers.Tokenizer``.

    Raises:
        ValueError: it is neither.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(self._backend, "id_to_token"):
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer; convert it to one")
        decoders = decoder_types(self._backend)
        self._spelling = _byte_spelling() if decoders == ["ByteLevel"] else None
        self.has_byte_tokens = "ByteFallback" in decoders
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self._anchor = self._find_anchor()
        self._known: dict[int, bytes] = {}

    def is_special(self, token: int) -> bool:
        """Whether a token is a control token such as EOS."""
        return token in self._special

    def within(self, token: int) -> bytes:
        """Return the bytes of a token inside a text; none for ids that the tokenizer lacks."""
        known = self._known.get(token)
        if known is None:
            known = self._find(token)
            if known:  # ids beyond the vocabulary could be any number
                self._known[token] = known
        return known

    def at_start(self, token: int) -> bytes:
        """Return its bytes at the start of a text, where some tokenizers drop a leading space."""
        raw = self.within(token)
        if self._spelling is not None or not raw[:1].isascii():
            return raw
        return self._decode([token]).encode()

    def _find(self, token: int) -> bytes:
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._spelling is not None:
            if all(char in self._spelling for char in piece):
                return bytes(self._spelling[char] for char in piece)
            return bytes(piece.encode())
        if self.has_byte_tokens and (match := BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(match[1])
        before = self._decode(self._anchor)
        return self._decode([*self._anchor, token]).removeprefix(before).encode()

    def _find_anchor(self) -> list[int]:
        """Return a token to decode others after, so that they do not stand at the start."""
        for token in range(self._backend.get_vocab_size()):
            if token not in self._special and self._decode([token]).strip(f" {REPLACEMENT}"):
                return [token]
        return []

    def _decode(self, tokens: list[int]) -> str:
        return str(self._backend.decode(tokens, skip_special_tokens=False))


class Detokenizer:
    """The text of one sequence, token by token, at constant cost for each.

    The texts add up to what the tokenizer's ``decode`` makes of all tokens (without its clean-up of
    spaces), with one exception: where bytes of a <0xE4>-style run form no character, ``decode``
    gives up the whole run, but characters that were complete have been sent by then and stay.

    Args:
        tokenizer: fast; or its ``TokenBytes``, where many detokenizers share it.
        prompt: tokens that the text continues. After a prompt with text, the first token keeps
            its leading space: "The capital of France is" goes on with " Paris". At the start of a
            text, tokenizers such as Llama 2's drop that space.
        stop: the text ends before the one that is complete first; of two that end at the same
            character, before the longer one. How tokens cut the text makes no difference.
        include_stop_str: end after the stop string instead.
        skip_special_tokens: leave control tokens out.
        keep: control tokens that stay in the text all the same.
        min_tokens: stop strings that are complete with so many of the first tokens are text like
            any other, as in vLLM.

    Raises:
        ValueError: a stop string is empty, or the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Iterable[str] = (),
        include_stop_str: bool = False,
        skip_special_tokens: bool = True,
        prompt: Sequence[int] = (),
        keep: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        self._bytes = tokenizer if isinstance(tokenizer, TokenBytes) else TokenBytes(tokenizer)
        self._stops = [StopString(text) for text in stop]
        self._include_stop = include_stop_str
        self._skip_special = skip_special_tokens
        self._keep = keep
        self._unchecked = min_tokens
        """Tokens to come with which no stop string ends the text."""
        errors = "surrogateescape" if self._bytes.has_byte_tokens else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._started = any(map(self._has_text, prompt[: -MOST_LOOKED_AT - 1 : -1]))
        self._held = ""
        self._stopped_by: str | None = None

    def push(self, token_ids: Iterable[int]) -> TextDelta:
        """Add tokens. After a stop string they change nothing."""
        if not (self._unchecked and self._stops):
            return self._emit(self._decoder.decode(b"".join(self._raw(token_ids))))
        text, delta = "", TextDelta("")
        for token in token_ids:
            delta = self._emit(self._decoder.decode(b"".join(self._raw([token]))))
            self._unchecked = max(0, self._unchecked - 1)
            text += delta.text
        return TextDelta(text, delta.stopped_by)

    def finish(self) -> TextDelta:
        """Release what was held back; half a character becomes a replacement character."""
        certain = self._emit(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return TextDelta(certain.text + rest, certain.stopped_by)

    def _has_text(self, token: int) -> bool:
        if self._skip_special and self._bytes.is_special(token) and token not in self._keep:
            return False
        return bool(self._bytes.within(token))

    def _raw(self, token_ids: Iterable[int]) -> Iterator[bytes]:
        for token in token_ids:
            if not self._has_text(token):
                continue
            yield self._bytes.within(token) if self._started else self._bytes.at_start(token)
            self._started = True

    def _emit(self, new: str) -> TextDelta:
        if self._stopped_by is not None:
            return TextDelta("", self._stopped_by)
        if self._bytes.has_byte_tokens:
            # As the ByteFallback decoder has it: one replacement for each byte.
            new = _STRAY_BYTE.sub(REPLACEMENT, new)
        if not self._stops:
            return TextDelta(new)  # nothing is ever held back
        text = self._held + new
        for end, char in enumerate(new, len(self._held) + 1):
            complete = [stop.text for stop in self._stops if stop.feed(char)]
            if complete and not self._unchecked:
                return self._stop(text[:end], max(complete, key=len))
        certain = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._held = text[certain:]
        return TextDelta(text[:certain])

    def _stop(self, text: str, by: str) -> TextDelta:
        self._stopped_by, self._held = by, ""
        return TextDelta(text if self._include_stop else text[: -len(by)], by)


class StopString:
    """Finds a string in text that comes one character at a time (Knuth, Morris, Pratt 1977).

    Attributes:
        text: what is looked for.
        matched: how many of its first characters end the text so far.
    """

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("a stop string must not be empty")
        self.text = text
        self.matched = 0
        # _shorter[i]: how many characters still match after i matched and the next one does not.
        self._shorter = [0, 0]
        for char in text[1:]:
            length = self._shorter[-1]
            while length and text[length] != char:
                length = self._shorter[length]
            self._shorter.append(length + (text[length] == char))

    def feed(self, char: str) -> bool:
        """Whether the string is complete with ``char``."""
        if self.matched == len(self.text):
            self.matched = self._shorter[self.matched]
        while self.matched and self.text[self.matched] != char:
            self.matched = self._shorter[self.matched]
        self.matched += self.text[self.matched] == char
        return self.matched == len(self.text)


def _byte_spelling() -> dict[str, int]:
    """How byte-level BPE (GPT-2) writes bytes: printable characters of Latin-1 stand for
    themselves, the rest for U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }
