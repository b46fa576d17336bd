"""Facts of an instance, from what its engine says when it is ready."""

from __future__ import annotations

from pla_serve.wire.engine import EngineReady
from pla_serve.wire.link import InstanceFacts


def instance_facts(info: EngineReady, boot: str, model: str, block_tokens: int) -> InstanceFacts:
    """Return the facts of an instance for routers.

    Args:
        boot: name of the engine's life.
        model: name by which clients call the model.
        block_tokens: tokens in a KV block of the engine.
    """
    return InstanceFacts(
        boot=boot,
        kind="pla",
        model=model,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        kv_tokens=info.kv_tokens,
        block_tokens=block_tokens,
        kv_bytes_per_token=info.kv_bytes_per_token,
        layers=info.layers,
        device=info.device,
        dtype=info.dtype,
        policy=info.policy,
        express=info.capabilities.leaves_at_layer_boundary,
        resumes=True,
        transfer=info.transfer,
        transfer_agent=info.transfer_agent,
    )
