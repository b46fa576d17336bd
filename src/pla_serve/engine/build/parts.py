"""What one engine is put together from."""

from __future__ import annotations

from dataclasses import dataclass, field

from pla_serve.engine.run.executor import Executor
from pla_serve.engine.requests.admission import Intake
from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.requests.memory import MemoryGate
from pla_serve.engine.sampling import Sampler
from pla_serve.engine.transfer.protocol import KVExchange, NoKVExchange
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import PrefillPolicy


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What a loop drives."""

    executor: Executor
    """Where batches run."""
    kv: KVManager
    gate: MemoryGate
    sampler: Sampler
    intake: Intake
    policy: PrefillPolicy
    cost: CostModel
    exchange: KVExchange = field(default_factory=NoKVExchange)
    async_scheduling: bool = True
    """See `EngineConfig`."""
