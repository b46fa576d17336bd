"""Server-sent events of the OpenAI streaming API, read at little cost for each token."""

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
        """None if the server does not say."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class StreamedDelta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class StreamedChoice(msgspec.Struct):
    """Of a chat (``delta``) or of a completion (``text``)."""

    delta: StreamedDelta | None = None
    text: str | None = None
    finish_reason: str | None = None

    @property
    def content(self) -> str:
        if self.delta is not None:
            return self.delta.content or self.delta.reasoning_content or ""
        return self.text or ""


class StreamedEvent(msgspec.Struct):
    """One ``data:`` payload; fields that are not needed here are skipped, not kept."""

    choices: list[StreamedChoice] = []
    usage: Usage | None = None
    error: Any = None


DONE = b"[DONE]"
_decode = msgspec.json.Decoder(StreamedEvent).decode


def decode(payload: bytes) -> StreamedEvent:
    """Raises:
    msgspec.MsgspecError: not JSON, or not a chunk of an answer.
    """
    return _decode(payload)


class EventSplitter:
    """Takes bytes in whatever portions they come; gives the payloads of complete events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, portion: bytes) -> list[bytes]:
        """Payloads that ``portion`` completes. Lines end in LF or CRLF; comments are skipped."""
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
