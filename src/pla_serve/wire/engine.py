"""All messages between an API server and its engine process, by direction.

==================  ==========================================  ===================
direction           about one request                           about the engine
==================  ==========================================  ===================
server to engine    AddRequest, AbortRequest                    Ping, Shutdown
                    Reserve, Begin, Lend, Release (KV transfer)
engine to server    Accepted, Rejected, Output                  EngineReady, Pong
                    Offer (KV transfer)                         EngineStats
                                                                EngineFailed
==================  ==========================================  ===================

Each message is one msgpack map with a field ``type``, and one ZeroMQ message over a socket in a
private folder (`codec`). Routers send the messages about one request to instances as well; `link`
lists what else they say to each other.
"""

from __future__ import annotations

from pla_serve.wire.answers import (
    Accepted,
    FinishReason,
    Output,
    PromptLogprobs,
    Rejected,
    TokenLogprob,
)
from pla_serve.wire.lifecycle import EngineFailed, EngineReady, Ping, Pong, Shutdown
from pla_serve.wire.requests import (
    AbortRequest,
    AddRequest,
    FreeThought,
    Grammar,
    HandOver,
    Pooling,
    SamplingParams,
)
from pla_serve.wire.statistics import EngineLoad, EngineStats, LatencySample, TransferStats
from pla_serve.wire.transfer import Begin, Lend, Offer, Release, Reserve

__all__ = [
    "AbortRequest",
    "Accepted",
    "AddRequest",
    "Begin",
    "EngineFailed",
    "EngineLoad",
    "EngineReady",
    "EngineStats",
    "FinishReason",
    "FreeThought",
    "FromEngine",
    "Grammar",
    "HandOver",
    "Inbound",
    "LatencySample",
    "Lend",
    "Offer",
    "Outbound",
    "Output",
    "Ping",
    "Pong",
    "Pooling",
    "PromptLogprobs",
    "Rejected",
    "Release",
    "RequestAnswer",
    "Reserve",
    "SamplingParams",
    "Shutdown",
    "ToEngine",
    "TokenLogprob",
    "TransferStats",
]

Inbound = AddRequest | AbortRequest | Reserve | Begin | Lend | Release
"""About one request, to the engine."""

RequestAnswer = Output | Accepted | Rejected | Offer
"""About one request, from the engine."""

Outbound = RequestAnswer | EngineReady | EngineStats
"""From the engine."""

ToEngine = Inbound | Ping | Shutdown
"""To the process that hosts the engine."""

FromEngine = Outbound | Pong | EngineFailed
"""From the process that hosts the engine."""
