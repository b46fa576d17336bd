"""Collaborators of an engine's loop, which `pla_serve.engine.build` makes and puts together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.loop.telemetry import Telemetry
from pla_serve.engine.requests.admission import Intake
from pla_serve.engine.requests.memory import MemoryGate
from pla_serve.engine.run.executor import Executor
from pla_serve.engine.sampling import Sampler
from pla_serve.engine.transfer.protocol import KVExchange, NoKVExchange
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.wire.engine import Outbound


class IdleRecalibration(Protocol):
    """A warm-up that goes on while the engine is idle."""

    @property
    def active(self) -> bool:
        """Whether something is left to measure."""
        ...

    def step(self, interrupted: Callable[[], bool]) -> bool:
        """Run one batch, if one is left, up to a boundary at which ``interrupted`` says so.

        Returns whether something is left to measure.
        """
        ...


class NoRecalibration:
    """Measures nothing: all of it was done before the engine became ready."""

    active = False

    def step(self, interrupted: Callable[[], bool]) -> bool:
        """See `IdleRecalibration`."""
        return False


@dataclass(frozen=True, slots=True)
class EngineParts:
    """Collaborators of one loop. Each is made for this loop and shared with no other."""

    executor: Executor
    """Runs batches on the device."""
    kv: KVManager
    """Owns the KV blocks and the prefix cache."""
    gate: MemoryGate
    """Decides which sequences get KV blocks, and parks the others."""
    sampler: Sampler
    """Chooses the next token of each sequence."""
    intake: Intake
    """Checks and admits requests."""
    policy: PrefillPolicy
    """Decides which batch runs next."""
    cost: CostModel
    """Predicts the time of batches, for reports. The policy teaches it."""
    exchange: KVExchange = field(default_factory=NoKVExchange)
    """Moves KV from and to other engines."""
    recalibration: IdleRecalibration = field(default_factory=NoRecalibration)
    """Measures what batches take while there is nothing else to do."""
    async_scheduling: bool = True
    """See `EngineConfig.async_scheduling`."""


@dataclass(frozen=True, slots=True)
class LoopContext:
    """Everything that the objects of one loop share."""

    parts: EngineParts
    emit: Callable[[Outbound], None]
    """Sends a message to the server."""
    clock: Callable[[], float]
    """Monotonic seconds, the clock of `AddRequest.arrival`."""
    telemetry: Telemetry
    """Counters for reports."""
