"""Requests for tokens, sent to an engine by its own server or by a router."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pla_serve.policy.protocol import ServiceLevel
from pla_serve.wire.limits import (
    MOST_BIASES,
    MOST_LOGPROBS,
    MOST_STOP_IDS,
    Id,
    Lease,
    Name,
    Pace,
    Priority,
    Seconds,
    Share,
    Text,
    TokenCount,
    TokenId,
    Tokens,
)

Pooling = Literal["last", "mean", "cls"]
"""How one vector is made of the last hidden states of a text: that of the last token, the mean of
all, or that of the first one."""


class FreeThought(msgspec.Struct, frozen=True, omit_defaults=True):
    """Reasoning before the text that a grammar constrains. What it says is free."""

    closing: Text
    """Marker that ends it, such as ``</think>``."""
    closing_token: TokenId | None = None
    """Token of that marker; None if the marker is spelled with several tokens."""
    opening: Text = ""
    """Marker that the output may begin with; without it there is no reasoning. Empty: the prompt
    has begun the reasoning."""
    opening_token: TokenId | None = None
    most_tokens: TokenCount = 0
    """Longest reasoning, after which the closing marker is forced; needs ``closing_token``.
    0: no bound."""


class Grammar(msgspec.Struct, frozen=True, tag_field=None, omit_defaults=True):
    """A constraint on the output text."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    spec: Text = ""
    """The schema as JSON text, the regular expression, or the grammar; empty for json_object."""
    optional: bool = False
    """Whether an engine that has no grammars of this kind may leave it out."""
    thought: FreeThought | None = None
    """Reasoning that comes first; None if the grammar holds from the first token."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one sequence is sampled. Token ids are checked against the vocabulary by the engine."""

    max_tokens: TokenCount
    """0: the prompt is computed, for its log probabilities or for the prefix cache, and the output
    is empty."""
    min_tokens: TokenCount = 0
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: TokenCount = 0
    """0 keeps all."""
    min_p: Share = 0.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.001, le=100)] = 1.0
    """Logits are divided by it, so a smaller one than 0.001 would overflow them."""
    logit_bias: (
        Annotated[
            dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MOST_BIASES)
        ]
        | None
    ) = None
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MOST_STOP_IDS)] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    """None: no log probabilities. 0: of the chosen token. k: of the k most likely ones as well,
    before sampling filters."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    """As ``logprobs``, of the tokens of the prompt from the second one on. They come with the first
    output, so a request of which some output was ``generated`` elsewhere gets none. No prefix that
    is cached is used, and such a request is not handed over."""
    grammar: Grammar | None = None
    embedding: Pooling | None = None
    """None: no embedding. Else the embedding of the prompt comes with the only output, which needs
    ``max_tokens`` 0, no grammar and nothing ``generated`` elsewhere; it is not handed over. With
    mean and cls no prefix that is cached is used."""


class HandOver(msgspec.Struct, frozen=True, kw_only=True):
    """Wish to prefill only, and to let another instance read the KV while it is being made."""

    lease_seconds: Lease
    """How long the KV is kept after the first token, if no `Release` comes."""


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    """One sequence to generate. A request with ``n > 1`` is several of these."""

    id: Id
    prompt: Tokens
    sampling: SamplingParams
    arrival: Seconds
    """Seconds on the machine's monotonic clock; on a link, the difference to the time of sending,
    because the clocks of two machines do not agree."""
    deadline: Seconds | None = None
    """When the first token is due, on the same clock."""
    tpot: Pace | None = None
    """Target for the time between two of its tokens; None: the engine's own."""
    service: ServiceLevel = ServiceLevel.USUAL
    """Whether ``deadline`` and ``tpot`` were promised, so that the request is refused where they
    cannot be kept; or whether nobody waits for it."""
    priority: Priority = 0
    """Smaller is sooner."""
    generated: TokenCount = 0
    """How many of the last tokens of ``prompt`` are output that the client has got already, from
    another instance. Sampling, limits and usage take them as output, so what follows is what would
    have followed there. A request whose seed is None is not continued exactly."""
    hand_over: HandOver | None = None
    """If set, an `Offer` follows when the prefill begins, and the request ends with its first
    token: as "handed_over", or for a reason of its own. An engine without KV transfer refuses."""
    cache_scope: Name = ""
    """Part of the prefix cache that the request may use: KV is shared between requests of equal
    scope only. Empty for the part that all requests without a scope share."""
    tenant: Name = ""
    """Owner of the API key that asked, as the same text for the same key and never the key itself;
    an engine shares its time between tenants. Empty: nobody in particular."""
    request_id: Annotated[str, Meta(max_length=128)] = ""
    """Id of the HTTP request that this is part of, for logs; the client may have chosen it."""

    @property
    def reads_prompt(self) -> bool:
        """Whether hidden states of the prompt are wanted, which only the engine has that made them.

        Such a request is computed by one engine.
        """
        return self.scores_prompt or self.sampling.embedding is not None

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of the prompt are to be computed.

        They come with the first output, so the engine that makes that one computes them.
        """
        return self.sampling.prompt_logprobs is not None and not self.generated


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """Stop a request and free its KV; unknown ids are ignored. It gets no further output."""

    id: Id
