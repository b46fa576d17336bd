"""Stage 3: how many KV blocks there are."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from pla_serve.engine.batch.staging import Scratch
from pla_serve.engine.build.model import RankModel
from pla_serve.engine.build.settings import RankSettings
from pla_serve.engine.kv.sizing import KVPlan, plan_kv
from pla_serve.engine.kv.system_memory import return_freed_memory
from pla_serve.engine.parallel.ranks import least


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Sizes of the KV cache, the same on all ranks."""

    plan: KVPlan
    scratch: Scratch | None
    """Slots of one more block, which padding tokens write to. None if nothing is padded."""
    slots: int
    """Token slots of the KV cache, scratch included."""


def build_memory(settings: RankSettings, model: RankModel) -> RankMemory:
    """Fit the KV cache to the memory that is free once the fused model is loaded.

    Raises:
        ValueError: the settings do not fit the model or the memory. Says what to change.
    """
    gc.collect()  # stock layers that were fused since; their modules refer to each other
    return_freed_memory()
    plan = plan_kv(
        settings.config,
        model.kv_shape,
        settings.device,
        model.positions,
        lambda blocks: least(settings.ranks, blocks),
    )
    block_tokens = settings.config.block_tokens
    slots = plan.blocks * block_tokens
    if not settings.pads:
        return RankMemory(plan, None, slots)
    return RankMemory(plan, Scratch(slots, block_tokens), slots + block_tokens)
