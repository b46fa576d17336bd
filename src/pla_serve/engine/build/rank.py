"""Stages 1 to 5 in order: everything that one rank needs to run batches."""

from __future__ import annotations

from dataclasses import dataclass

from pla_serve.engine.build.device import RankDevice, build_device
from pla_serve.engine.build.execution import Execution, build_execution
from pla_serve.engine.build.memory import RankMemory, build_memory
from pla_serve.engine.build.model import RankModel, build_model
from pla_serve.engine.build.settings import RankSettings
from pla_serve.engine.parallel.ranks import agree


@dataclass(frozen=True, slots=True)
class BuiltRank:
    """All stages of one rank."""

    settings: RankSettings
    model: RankModel
    memory: RankMemory
    device: RankDevice
    execution: Execution

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's KV over all layers and all ranks."""
        return self.model.kv_shape.bytes_per_token * self.settings.ranks.size


def build_rank(settings: RankSettings) -> BuiltRank:
    """Build one rank. All ranks of an engine call this at the same time and wait for each other.

    Raises:
        LoadingError: the model cannot be had, or is not supported.
        ValueError: the settings do not fit the model or the machine.
        RuntimeError: the ranks differ in what they have built.
    """
    model = build_model(settings)
    memory = build_memory(settings, model)  # after fusing, which frees and takes memory
    device = build_device(settings, model)
    execution = build_execution(settings, model, memory, device)
    agree(settings.ranks, f"shapes {[tuple(s) for s in execution.shapes]}, {memory.plan}")
    return BuiltRank(settings, model, memory, device, execution)
