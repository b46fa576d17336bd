"""Names what prefills cannot be left with. Then steps run whole, and the log says why."""

from __future__ import annotations

from typing import Any

from pla_serve.plugins.vllm.versions import installed_version, release_series

TESTED = "0.32"
"""The release series whose model runner this was tested with."""


def why_not(config: Any) -> str | None:
    """Return why long steps of such a configuration are not left; None if they are.

    Args:
        config: vLLM's ``VllmConfig``.
    """
    found = installed_version() or "none"
    if release_series(found) != TESTED:
        return f"vLLM {found} (its model runner was tested with {TESTED}.x only)"
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    reasons = {
        "data parallelism": parallel.data_parallel_size > 1,
        "context parallelism": _above_one(parallel, "decode_context_parallel_size")
        or _above_one(parallel, "prefill_context_parallel_size"),
        "expert load balancing": parallel.enable_eplb,
        "dual-batch overlap": parallel.use_ubatching,
        "asynchronous scheduling (--no-async-scheduling)": config.scheduler_config.async_scheduling,
        "vLLM's second model runner (VLLM_USE_V2_MODEL_RUNNER=0)": config.use_v2_model_runner,
        "speculative decoding": config.speculative_config is not None,
        "LoRA": config.lora_config is not None,
        "KV connectors": config.kv_transfer_config is not None,
        "encoder connectors": config.ec_transfer_config is not None,
        "mixtures of experts": model.is_moe,
        "multimodal models": model.is_multimodal_model,
        "prompt embeddings": model.enable_prompt_embeds,
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
    }
    return next((name for name, found in reasons.items() if found), None)


def _above_one(settings: Any, name: str) -> bool:
    return getattr(settings, name, 1) > 1
