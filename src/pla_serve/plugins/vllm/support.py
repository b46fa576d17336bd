"""Refuses at start, by name, whatever this scheduler does not support."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.pla_serve")


def refuse_unsupported(config: VllmConfig, mamba_layers: bool) -> None:
    """Compare a configuration with what was thought of.

    Raises:
        ValueError: it asks for something that is not supported; the message says what to change.
    """
    model = config.model_config
    problem = None
    if model.runner_type != "generate":
        problem = f"models of runner type {model.runner_type!r}: only text generation is scheduled"
    elif model.is_diffusion:
        problem = "diffusion models"
    elif model.is_encoder_decoder:
        problem = "encoder-decoder models"
    elif config.is_mm_encoder_only:
        problem = "instances that only run a multimodal encoder"
    elif mamba_layers:
        problem = "models with Mamba or linear-attention layers, whose chunks vLLM aligns itself"
    elif not config.scheduler_config.enable_chunked_prefill:
        problem = "--no-enable-chunked-prefill: a long prefill could not be left for a short one"
    if problem:
        raise ValueError(
            f"LengthAwareScheduler does not support {problem}. Start without --scheduler-cls"
        )
