"""What crosses the boundary between the API server and the engine core, msgpack-encoded."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


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


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """Stop a request and free its KV; unknown ids are ignored. It gets no further output."""

    id: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave after the running batch. The process hosting the core obeys it; no core sees it."""


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """Admitted: sent right after admission and before any work, so it precedes every output."""

    id: str
    cached_tokens: int = 0
    """Prompt tokens in the prefix cache at admission; may have changed by the first output."""


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


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Sent a few times a second while work runs, and once on going idle. Counters are totals."""

    short_waiting: int
    long_waiting: int
    running: int
    parked: int
    """Requests that wait for KV memory."""
    waiting_tokens: int
    queued_seconds: float
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
    graph_replays: dict[str, int] = {}
    """Counter by captured shape, as ``tokens x requests``."""
    graph_fallbacks: dict[str, int] = {}
    """Counter by reason: batches on the ordinary kernels while shapes are captured."""
    graph_tokens: int = 0
    """Counter: real tokens in captured shapes."""
    graph_padding: int = 0
    """Counter: padding there."""


Inbound = AddRequest | AbortRequest
"""What a core's inbox yields."""

Outbound = Output | Accepted | Rejected | EngineReady | EngineStats
"""What a core emits."""

ToEngine = Inbound | Shutdown
"""What travels to the process that hosts the core."""

FromEngine = Outbound | EngineFailed
"""What travels back from it."""
