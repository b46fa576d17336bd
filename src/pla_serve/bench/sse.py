"""Reads server-sent events of the OpenAI streaming API, at little cost for each token."""

from __future__ import annotations

from typing import Any

import msgspec


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that were cached, or None if the server does not say."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class StreamedDelta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class EventChoice(msgspec.Struct):
    """Choice of a chunk: ``delta`` in a chat, ``text`` in a completion."""

    delta: StreamedDelta | None = None
    text: str | None = None
    finish_reason: str | None = None

    @property
    def content(self) -> str:
        if self.delta is not None:
            return self.delta.content or self.delta.reasoning_content or ""
        return self.text or ""


class StreamedEvent(msgspec.Struct):
    """Payload of one ``data:`` line, with the fields that are needed here."""

    choices: list[EventChoice] = []
    usage: Usage | None = None
    error: Any = None


DONE = b"[DONE]"
_decode = msgspec.json.Decoder(StreamedEvent).decode


def decode(payload: bytes) -> StreamedEvent:
    """Decode a payload.

    Raises:
        msgspec.MsgspecError: it is not JSON, or no chunk of an answer.
    """
    return _decode(payload)


class EventSplitter:
    """Splits a stream of bytes, in portions of any size, into the payloads of events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, portion: bytes) -> list[bytes]:
        """Return the payloads that ``portion`` completes.

        Lines end in LF or CRLF; comments are skipped.
        """
        *lines, self._rest = (self._rest + portion).split(b"\n")
        payloads = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                payloads.append(b"\n".join(self._data))
                self._data.clear()
        return payloads
