"""What a router and an instance say to each other, beside the engine's own messages.

A frame is a msgpack array of messages. Times inside `AddRequest` are differences to the moment of
sending, because the clocks of two machines do not agree.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    AddRequest,
    Begin,
    Lend,
    Offer,
    Output,
    Rejected,
    Release,
    Reserve,
)

PATH = "/fleet/link"
SUBPROTOCOL = "pla-serve.link.1"
"""Both sides must name the same one: there is no conversion between versions."""
REPORT_SECONDS = 0.2
"""An instance is heard at least this often."""
ALIVE_SECONDS = 1.0
"""A router is heard at least this often."""

Role = Literal["mixed", "short", "long", "decode"]


class InstanceFacts(msgspec.Struct, frozen=True, kw_only=True, tag="facts"):
    """What does not change in one life of an engine; sent first, and after each new start."""

    boot: str
    """Another one for each life of the engine: nothing is cached after a change."""
    kind: Literal["pla", "vllm", "sglang"]
    model: str
    """What clients call it; the first name, if it has several."""
    max_model_len: int
    """Most tokens of prompt and output together."""
    vocab_size: int
    """0: unknown."""
    kv_tokens: int
    """Tokens whose KV fits; 0: unknown."""
    block_tokens: int
    """Tokens in one KV block: prefixes are shared in multiples of it."""
    kv_bytes_per_token: int = 0
    layers: int = 0
    device: str = ""
    dtype: str = ""
    policy: str = ""
    express: bool = False
    """Its shorts do not wait for its longs (`FleetModel.express`)."""
    resumes: bool = False
    """It obeys `AddRequest.generated`, so that a stream goes on there token for token."""
    transfer: str | None = None
    """As `EngineReady.transfer`: instances with the same text exchange KV."""


class InstanceReport(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """The heartbeat, and the state on each change. It has been through the engine, so a hang
    anywhere in the instance is silence. Seconds are predictions of the instance's own cost model.
    """

    role: Role
    ready: bool
    """False: it refuses new requests (it is told to end)."""
    draining: bool
    """A router asked that nothing new be sent here; what comes is served all the same."""
    age: float = 0.0
    """Seconds since the engine made the numbers below; those that follow are one snapshot."""
    short_waiting: int = 0
    long_waiting: int = 0
    running: int = 0
    """Decode."""
    parked: int = 0
    waiting_tokens: int = 0
    """New tokens that wait for their prefill."""
    queued_short_seconds: float = 0.0
    queued_long_seconds: float = 0.0
    kv_usage: float = 0.0
    """0 to 1."""
    kv_tokens: int = 0
    """Tokens whose KV fits; 0: unknown."""
    kv_cached_tokens: int = 0
    boundary_tokens: int = 0
    """L_m; 0: unknown yet."""
    cost: dict[str, float] | None = None
    """As `EngineStats.cost_seconds`; None: unknown (yet)."""
    requests: int = 0
    """Unfinished ones of all routers and direct clients."""


class EngineLost(msgspec.Struct, frozen=True, tag="engine_lost"):
    """The engine ended and every request on the link with it; new `InstanceFacts` may follow."""

    reason: str


class SetRole(msgspec.Struct, frozen=True, tag="role"):
    """From now on the instance reports this role, to all routers."""

    role: Role


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """From now on the instance reports that it wants no new requests, or wants them again."""

    on: bool


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The router's heartbeat."""


RequestMessage = AddRequest | AbortRequest | Reserve | Begin | Lend | Release
"""Of one request, to the instance."""

NewsMessage = Output | Accepted | Rejected | Offer
"""Of one request, from the instance."""

ToInstance = RequestMessage | SetRole | Drain | Alive
FromInstance = NewsMessage | InstanceFacts | InstanceReport | EngineLost
