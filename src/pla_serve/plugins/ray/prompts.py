"""Prompts of OpenAI's requests, as they pass a request router: as text, without a tokenizer."""

from __future__ import annotations

from array import array
from typing import Any

from pla_serve.fleet.router.prefixes import Chain
from pla_serve.plugins.ray.replicas import RoutedPrompt

BYTES_PER_TOKEN = 4
"""A typical token of English or code has so many bytes of UTF-8."""
MOST_BYTES = 1 << 20
"""Bytes of a prompt that are compared with others; hashing more would hold the event loop. Of a
prompt that is given as tokens, as many tokens are compared as a text of this size is taken for."""


def prompt_of(request: Any) -> RoutedPrompt | None:
    """Return the prompt of a chat or a completion request; None if it is neither.

    Args:
        request: a pydantic model or a mapping with ``messages`` or ``prompt``, which is a text, a
            list of texts or tokens.

    Texts are cut into groups of four bytes in place of tokens: requests that begin with the same
    text have the same first groups, and the length is about that in tokens.
    """
    messages, prompt = _field(request, "messages"), _field(request, "prompt")
    scope = _field(request, "cache_salt")
    if isinstance(messages, list) and messages:
        text = "".join(_message(message) for message in messages)
    elif isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, list) and prompt:
        tokens = prompt[: MOST_BYTES // BYTES_PER_TOKEN]
        if all(isinstance(token, int) and -(2**63) <= token < 2**63 for token in tokens):
            return RoutedPrompt(len(prompt), Chain(tokens, _text(scope)), told=False)
        text = "".join(map(_text, prompt))
    else:
        return None
    data = text.encode(errors="surrogatepass")
    groups = array("I")
    head = data[: min(len(data), MOST_BYTES) // groups.itemsize * groups.itemsize]
    groups.frombytes(head)
    return RoutedPrompt(
        max(1, len(data) // BYTES_PER_TOKEN), Chain(groups, _text(scope)), told=False
    )


def _message(message: Any) -> str:
    """Return a message as text that a longer conversation with it has at the same place."""
    content = _field(message, "content")
    if isinstance(content, list):
        content = "".join(_text(_field(part, "text")) for part in content)
    return f"{_text(_field(message, 'role'))}\n{_text(content)}\n"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _field(holder: Any, name: str) -> Any:
    if isinstance(holder, dict):
        return holder.get(name)
    return getattr(holder, name, None)
