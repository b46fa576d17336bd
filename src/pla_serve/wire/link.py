"""All messages between a router and an instance, by direction.

===================  ==========================================  =======================
direction            about one request                           about the instance
===================  ==========================================  =======================
router to instance   AddRequest, AbortRequest                    SetRole, Drain, Alive
                     Reserve, Begin, Lend, Release (KV transfer)
instance to router   Accepted, Rejected, Output                  InstanceFacts
                     Offer (KV transfer)                         InstanceReport
                                                                 EngineLost
===================  ==========================================  =======================

A WebSocket on `PATH` carries binary frames; each is a msgpack array of messages (`codec`,
`frames`). Times inside `AddRequest` are differences to the moment of sending, because the clocks
of two machines do not agree.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pla_serve.wire.engine import Inbound, RequestAnswer
from pla_serve.wire.limits import Count, Duration, Name, Text
from pla_serve.wire.statistics import EngineLoad

PATH = "/fleet/link"
SUBPROTOCOL = "pla-serve.link.2"
"""Both sides must name the same one: there is no conversion between versions."""
REPORT_SECONDS = 0.2
"""Longest time between two reports of an instance."""
ALIVE_SECONDS = 1.0
"""Longest time between two messages of a router."""

Role = Literal["mixed", "short", "long", "decode"]


class InstanceFacts(msgspec.Struct, frozen=True, kw_only=True, tag="facts"):
    """Properties of an engine that are constant until it restarts.

    They are the first message on a link, and are sent again after each restart.
    """

    boot: Name
    """Differs for each life of the engine: its cache is empty after a change."""
    kind: Name
    """Kind of server: a name in the registry of dialects, as "pla" or "vllm"."""
    model: Name
    """Name by which clients call the model; the first one, if it has several."""
    max_model_len: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    """Most tokens of prompt and output together."""
    vocab_size: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    """0 if it is not known."""
    kv_tokens: Count
    """Tokens whose KV fits; 0 if it is not known."""
    block_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    """Tokens in one KV block: prefixes are shared in multiples of it."""
    kv_bytes_per_token: Count = 0
    layers: Count = 0
    device: Name = ""
    dtype: Name = ""
    policy: Name = ""
    express: bool = False
    """Shorts do not wait for longs (`Capabilities.leaves_at_layer_boundary`)."""
    resumes: bool = False
    """Whether `AddRequest.generated` is obeyed, so that a stream goes on there token for token."""
    transfer: Text | None = None
    """As `EngineReady.transfer`: instances with the same text exchange KV."""
    transfer_agent: Text | None = None
    """As `EngineReady.transfer_agent`: the name that offers to this instance are bound to."""


class InstanceReport(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """Heartbeat of an instance, and its state on each change.

    The engine has answered since the last one, so a hang anywhere in the instance is silence.
    """

    role: Role
    ready: bool
    """False while it refuses new requests (it has been told to end)."""
    draining: bool
    """A router asked that nothing new be sent here; what comes is served all the same."""
    kv_tokens: Count = 0
    """Tokens whose KV fits; 0 if it is not known."""
    requests: Count = 0
    """Unfinished requests of all routers and direct clients."""
    age: Duration = 0.0
    """Seconds since the engine made ``load``."""
    load: EngineLoad = EngineLoad()
    ends_in: Duration | None = None
    """Seconds until the instance ends; None if it has not been told to. Until then it goes on with
    what it has, and lends its KV; routers move that away in time."""


class EngineLost(msgspec.Struct, frozen=True, tag="engine_lost"):
    """The engine ended and every request on the link with it; new `InstanceFacts` may follow."""

    reason: Text


class SetRole(msgspec.Struct, frozen=True, tag="role"):
    """Set the role that the instance reports to all routers."""

    role: Role


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Have the instance report that it wants no new requests, or that it wants them again."""

    on: bool


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """Heartbeat of a router."""


ToInstance = Inbound | SetRole | Drain | Alive
FromInstance = RequestAnswer | InstanceFacts | InstanceReport | EngineLost
