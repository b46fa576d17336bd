"""Answers of an engine to a request: accepted or refused, then tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pla_serve.wire.limits import (
    MOST_LOGPROBS,
    MOST_PROMPT_LOGPROBS,
    MOST_TOKENS,
    Count,
    Duration,
    Id,
    Logprob,
    Seconds,
    Text,
    TokenId,
    Tokens,
)

Scores = Annotated[bytes, Meta(max_length=4 * MOST_PROMPT_LOGPROBS)]
"""Packed numbers of 4 bytes."""
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

    logprob: Logprob
    rank: Count
    """1 for the most likely token."""
    top: Annotated[list[tuple[TokenId, Logprob]], Meta(max_length=1024)]
    """Token ids and log probabilities, the most likely first."""


class PromptLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities of the tokens of a prompt from the second one on, n tokens.

    They may be hundreds of thousands, so they are packed: each field is an array of little-endian
    numbers, row by row.

    Raises:
        ValueError: the fields do not have the same number of rows.
    """

    top: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)]
    """Most likely tokens of each row."""
    logprobs: Scores
    """(n,) float32: of the prompt's own tokens."""
    ranks: Scores
    """(n,) int32: 1 for the most likely token."""
    top_ids: Scores
    """(n, top) int32: the most likely tokens, the likeliest first."""
    top_logprobs: Scores
    """(n, top) float32."""

    def __post_init__(self) -> None:
        size = len(self.logprobs)
        table = size * self.top
        if size % 4 or (len(self.ranks), len(self.top_ids), len(self.top_logprobs)) != (
            size,
            table,
            table,
        ):
            raise ValueError("the log probabilities of a prompt have fields of different lengths")

    def __len__(self) -> int:
        """Return the number of tokens, one less than the prompt has."""
        return len(self.logprobs) // 4

    def entries(self, most: int = MOST_LOGPROBS) -> Iterator[TokenLogprob]:
        """Yield the log probabilities of one token after the other.

        Args:
            most: most likely tokens that are wanted of each, if there are more.
        """
        rows = zip(
            np.frombuffer(self.logprobs, "<f4").tolist(),
            np.frombuffer(self.ranks, "<i4").tolist(),
            np.frombuffer(self.top_ids, "<i4").reshape(-1, self.top).tolist()
            if self.top
            else [[]] * len(self),
            np.frombuffer(self.top_logprobs, "<f4").reshape(-1, self.top).tolist()
            if self.top
            else [[]] * len(self),
            strict=True,
        )
        for logprob, rank, ids, values in rows:
            yield TokenLogprob(logprob, rank, list(zip(ids, values, strict=True))[:most])


MOST_EMBEDDING = 1 << 16
"""Numbers of an embedding: the hidden size of a model."""


class Output(msgspec.Struct, frozen=True, kw_only=True, tag="output", omit_defaults=True):
    """New tokens of one request; the last one carries ``finish_reason``."""

    id: Id
    tokens: Tokens
    logprobs: Annotated[list[TokenLogprob], Meta(max_length=MOST_TOKENS)] | None = None
    """One for each token, if they were asked for."""
    prompt_logprobs: PromptLogprobs | None = None
    """On the first output, if they were asked for."""
    embedding: Annotated[bytes, Meta(max_length=4 * MOST_EMBEDDING)] | None = None
    """(hidden size,) little-endian float32, not normalised, if it was asked for."""
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
