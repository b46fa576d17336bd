"""Answers of an engine to a request: accepted or refused, then tokens."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pla_serve.wire.limits import Count, Duration, Id, Seconds, Text, TokenId, Tokens

FinishReason = Literal["stop", "length", "abort", "error", "handed_over"]
"""``handed_over``: another instance makes the tokens after these; no client ever sees it."""


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """The request is admitted. Sent before any work, so it precedes every output."""

    id: Id
    cached_tokens: Count | None = 0
    """Prompt tokens in the prefix cache at admission, which may have changed by the first output;
    None if the server is of a kind that does not say."""


class Rejected(msgspec.Struct, frozen=True, kw_only=True, tag="rejected"):
    """The request is refused before any work was spent."""

    id: Id
    reason: Text
    retry_after: Duration | None
    """Seconds after which a retry may succeed; None if it never will (a fault of the request)."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities over the whole vocabulary, before sampling filters.

    Example: ``TokenLogprob(-0.2, 1, [(17, -0.2), (4, -2.3)])`` for the most likely token, with the
    two most likely ones beside it.
    """

    logprob: float
    rank: Count
    """1 for the most likely token."""
    top: Annotated[list[tuple[TokenId, float]], Meta(max_length=1024)]
    """Token ids and log probabilities, the most likely first."""


class Output(msgspec.Struct, frozen=True, kw_only=True, tag="output", omit_defaults=True):
    """New tokens of one request; the last one carries ``finish_reason``."""

    id: Id
    tokens: Tokens
    logprobs: list[TokenLogprob] | None = None
    """One for each token, if they were asked for."""
    finish_reason: FinishReason | None = None
    stop_token: TokenId | None = None
    """The last of ``tokens``, if generation ended because of it (EOS or a stop id)."""
    cached_tokens: Count | None = None
    """On the first output: prompt tokens whose KV was found in the prefix cache."""
    queued: Seconds | None = None
    """On the first output: seconds from arrival until the prefill began."""
    error: Text | None = None
    fault: Literal["engine", "request"] = "engine"
    """Whose fault the error is. A request's own fault, such as a grammar that cannot be followed,
    says nothing about the engine, and no other engine would do better."""
