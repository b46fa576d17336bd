"""What crosses the boundary between the API server and the engine core, msgpack-encoded."""

from __future__ import annotations

from typing import Literal

import msgspec

from pla_serve.policy.protocol import Capabilities

FinishReason = Literal["stop", "length", "abort", "error", "handed_over"]
"""``handed_over``: another instance makes the tokens after these; no client ever sees it."""


class Grammar(msgspec.Struct, frozen=True, tag_field=None):
    """A constraint on the output text."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    spec: str = ""
    """The schema as JSON text, the regular expression, or the grammar; empty for json_object."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one sequence is sampled. Ranges are checked by the server before they come here."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none; 0: of the chosen token; k: of the k most likely as well (before sampling)."""
    grammar: Grammar | None = None


class HandOver(msgspec.Struct, frozen=True, kw_only=True):
    """Prefill only, and let another instance read the KV while it is being made."""

    lease_seconds: float
    """How long the KV is kept after the first token, if no `Release` comes."""


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    """One sequence to generate. ``n > 1`` is several of these."""

    id: str
    prompt: list[int]
    sampling: SamplingParams
    arrival: float
    """Seconds on the machine's monotonic clock."""
    deadline: float | None = None
    """The same clock: when the first token is due."""
    priority: int = 0
    generated: int = 0
    """How many of the last tokens of ``prompt`` are output that the client has got already, from
    another instance. Sampling, limits and usage take them as output, so what follows is what would
    have followed there. A request whose seed is None is not continued exactly."""
    hand_over: HandOver | None = None
    """Set: an `Offer` follows when its prefill begins, and it ends with its first token: as
    "handed_over", or for a reason of its own. Refused by an engine without KV transfer."""
    request_id: str = ""
    """Of the HTTP request that it is part of, for logs; the client may have chosen it."""


class Reserve(msgspec.Struct, frozen=True, kw_only=True, tag="reserve"):
    """Take a request over from another instance: reserve its KV here and read what is offered.

    Answered by `Accepted` (``cached_tokens``: what is cached here and will not be moved) or, with
    no memory or no transfer, `Rejected`, at once. Reading starts at once as well; no token is made
    before `Begin`. `AbortRequest` gives it up.
    """

    request: AddRequest
    """As the other instance got it; its ``hand_over`` is ignored."""
    source: bytes
    """Of the other instance's `Offer`; empty: nothing to read, only memory is reserved."""
    lease_seconds: float
    """Without `Begin` the reservation ends, with an `Output` of "error", this long after the last
    sign of progress: this message, or another layer read."""

    @property
    def id(self) -> str:
        return self.request.id


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="begin"):
    """Go on with a reserved request, as an ordinary one: `Output` follows, no ``Accepted`` again.

    Whatever KV could not be read, because the other side died or is late, is computed here. With
    an id that is not reserved (its lease is over) the answer is `Rejected`.
    """

    id: str
    tokens: list[int]
    """Output of the other instance, which the client has got: the first token. Empty if it made
    none (it died, or it only lent a prefix): then the first token is made here."""


class Lend(msgspec.Struct, frozen=True, kw_only=True, tag="lend"):
    """Offer what the prefix cache has of these tokens to another instance; `Offer` is the answer.

    With it a request moves to where there is room: `Lend` here, `Reserve` with the offer there,
    `Begin` without tokens.
    """

    id: str
    """Of the request that it is for; one that runs nowhere on this instance."""
    tokens: list[int]
    lease_seconds: float


class Release(msgspec.Struct, frozen=True, tag="release"):
    """The offer of this id has been read, or is of no use: free its KV. Unknown ids are ignored."""

    id: str


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """Stop a request and free its KV; unknown ids are ignored. It gets no further output."""

    id: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave after the running batch. The process hosting the core obeys it; no core sees it."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Answered by `Pong` at the next layer boundary, by the process hosting the core."""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """The engine is alive and gets to its inbox."""


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """Admitted: sent right after admission and before any work, so it precedes every output."""

    id: str
    cached_tokens: int | None = 0
    """Prompt tokens in the prefix cache at admission; may have changed by the first output. None:
    unknown (of engines of other kinds)."""


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """KV that another instance may read from now on, also while it is still being computed.

    Sent once, when the prefill of a request with ``hand_over`` begins, or as answer to `Lend`.
    Send `Reserve` with it to the instance that is to decode, and `Release` here once that
    instance has sent its first `Output`, or ended the request without one.
    """

    id: str
    source: bytes
    """For `Reserve`; means nothing to anyone else. Empty: nothing is cached (`Lend` only)."""
    tokens: int
    """Leading tokens of the prompt that it is, or will be, the KV of."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities over the whole vocabulary, before sampling filters."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Output(msgspec.Struct, frozen=True, kw_only=True, tag="output", omit_defaults=True):
    """New tokens of one request; the last one carries ``finish_reason``."""

    id: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The last of ``tokens``, if generation ended because of it (EOS or a stop id)."""
    cached_tokens: int | None = None
    """On the first output: prompt tokens whose KV was found in the prefix cache."""
    queued: float | None = None
    """On the first output: seconds from arrival until its prefill began."""
    error: str | None = None


class Rejected(msgspec.Struct, frozen=True, kw_only=True, tag="rejected"):
    """Refused before any work was spent."""

    id: str
    reason: str
    retry_after: float | None
    """Seconds after which a retry may succeed; None if it never will (a fault of the request)."""


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The core has loaded its model and takes requests."""

    max_model_len: int
    """Most tokens of prompt and output together."""
    kv_tokens: int
    kv_bytes_per_token: int
    """Bytes of keys and values of one token, over all layers."""
    layers: int
    """Decoder layers."""
    vocab_size: int
    device: str
    dtype: str
    policy: str
    capabilities: Capabilities = Capabilities()
    """Of the policy."""
    transfer: str | None = None
    """What KV this engine can exchange: engines with the same text can. None: with nobody."""


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The last message of a process whose core raised."""

    error: str
    starting: bool
    """True if the core never became ready."""


class LatencySample(msgspec.Struct, frozen=True, array_like=True):
    """Times of one first token, in seconds, by the class the request had on arrival."""

    short: bool
    queue: float
    ttft: float


class TransferStats(msgspec.Struct, frozen=True, kw_only=True):
    """KV transfer of one engine. Counters are totals."""

    offers: int
    """Open now: KV kept for other instances."""
    reserved: int
    """Open now: requests that wait for KV from elsewhere, or for `Begin`."""
    taken_over: int
    """Counter: requests begun with all KV that was offered for them."""
    recomputed: int
    """Counter: requests begun without some of it."""
    expired: int
    """Counter: offers and reservations that ended with their lease."""
    bytes_read: int
    """Counter."""
    bytes_early: int
    """Counter: of these, what was read before the other instance had computed the last layer."""
    read_seconds: float
    """Counter: time spent on reading, which runs beside the engine."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Sent a few times a second while work runs, and once on going idle. Counters are totals."""

    short_waiting: int
    long_waiting: int
    running: int
    parked: int
    """Requests that wait for KV memory."""
    waiting_tokens: int
    queued_seconds: float
    """Predicted time to prefill all that waits."""
    queued_short_seconds: float
    """The short part of it."""
    kv_usage: float
    """Share of KV blocks held by requests; cached blocks that could be evicted do not count."""
    kv_cached_tokens: int
    prefix_queries: int
    """Counter: prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Counter: prompt tokens found there."""
    prompt_tokens: int
    generation_tokens: int
    batches: dict[str, int]
    """Counter by BatchClass."""
    express_batches: int
    """Counter: batches that ran at a layer boundary of another one."""
    recompute_preemptions: int
    boundary_tokens: int
    cost_error: float
    """Relative error of the cost model's recent predictions (median absolute)."""
    cost_seconds: dict[str, float]
    """The cost model's coefficients: seconds for a ``token``, a unit of ``attention``, a ``kv``
    token read, a ``sequence``, a ``launch``, as in `CostProfile`."""
    wait_error: dict[str, float]
    """Relative error of recently predicted times to first tokens by class (median absolute)."""
    wait_coverage: dict[str, float]
    """Share of recent first tokens by class that came by what was predicted for nine in ten."""
    firsts: list[LatencySample]
    """First tokens since the last message."""
    transfer: TransferStats | None = None
    """None without KV transfer."""
    graph_replays: dict[str, int] = {}
    """Counter by captured shape, as ``tokens x requests``."""
    graph_fallbacks: dict[str, int] = {}
    """Counter by reason: batches on the ordinary kernels while shapes are captured."""
    steps_ahead: int = 0
    """Counter: batches enqueued before the tokens of the one before them were known."""
    steps_waited: dict[str, int] = {}
    """Counter by reason: batches whose end was waited for before the next one was enqueued."""
    graph_tokens: int = 0
    """Counter: real tokens in captured shapes."""
    graph_padding: int = 0
    """Counter: padding there."""
    compile_failures: int = 0
    """Counter: times that compiled layers were given up for eager ones."""


Inbound = AddRequest | AbortRequest | Reserve | Begin | Lend | Release
"""What a core's inbox yields."""

Outbound = Output | Accepted | Rejected | Offer | EngineReady | EngineStats
"""What a core emits."""

ToEngine = Inbound | Ping | Shutdown
"""What travels to the process that hosts the core."""

FromEngine = Outbound | Pong | EngineFailed
"""What travels back from it."""
