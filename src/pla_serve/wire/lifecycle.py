"""Start, heartbeat and end of an engine process."""

from __future__ import annotations

import msgspec

from pla_serve.policy.protocol import Capabilities
from pla_serve.wire.limits import Count, Counts, Name, Text, TokenCount


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine has loaded its model and takes requests. First message of an engine."""

    max_model_len: TokenCount
    """Most tokens of prompt and output together."""
    kv_tokens: Count
    """Tokens whose KV fits in memory."""
    kv_bytes_per_token: Count
    """Bytes of keys and values of one token, over all layers."""
    layers: Count
    """Decoder layers."""
    vocab_size: TokenCount
    device: Name
    dtype: Name
    policy: Name
    """Name and knobs, as ``--policy`` takes them."""
    cpu_kernels: Name = ""
    """Level of the kernels that an engine on a CPU computes with; empty on other devices."""
    quantised: Counts = {}
    """Bytes of weights that stay quantised, by format."""
    cost_profile: Name = ""
    """``stored`` if predictions start with what an earlier start has measured, ``measured`` if this
    start has measured it; empty where that is not told."""
    capabilities: Capabilities = Capabilities()
    """Capabilities of the policy."""
    transfer: Text | None = None
    """Layout of the KV that this engine exchanges, and its fleet: engines with the same text can
    exchange KV. None if it exchanges none."""
    transfer_agent: Text | None = None
    """Name under which this engine reads KV of others; another one in each life of the process."""


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The engine raised an error. Last message of an engine process."""

    error: Text
    starting: bool
    """True if the engine never became ready."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Answered by `Pong` at the next layer boundary, by the process that hosts the engine."""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """The engine is alive and takes its messages."""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave after the running batch. The process that hosts the engine obeys it."""
