"""A second model runner over the same model, with buffers of its own.

vLLM's runner keeps what a step needs in buffers that the next step overwrites: token ids,
positions, block tables, slots, sequence lengths, sampling parameters. A nested step must leave
those of the outer step alone, so it runs on a twin: a shallow copy of the runner, in which every
buffer is replaced. Weights, KV memory and what is known of each request stay shared.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.utils.platform_utils import is_pin_memory_available
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.utils import CpuGpuBuffer


def make_twin(runner: Any) -> Any:
    """Return a runner that shares model, KV memory and requests with ``runner``, and no buffer.

    Its passes use no CUDA graphs: a captured graph reads the buffers of the runner that has
    captured it.

    Args:
        runner: vLLM's ``GPUModelRunner`` or ``CPUModelRunner``, with its KV caches.
    """
    twin = copy(runner)
    with torch.inference_mode(False):
        for name, value in vars(runner).items():
            fresh = _fresh(value)
            if fresh is not None:
                setattr(twin, name, fresh)
        _give_input_batch(twin)
        _give_metadata_builders(twin)
    twin.cudagraph_dispatcher = CudagraphDispatcher(twin.vllm_config)
    return twin


def empty(twin: Any) -> None:
    """Take all requests out of the twin's batch, because other steps have run meanwhile."""
    for request_id in list(twin.input_batch.req_id_to_index):
        twin.input_batch.remove_request(request_id)


def _fresh(value: Any) -> Any:
    """Return a buffer like ``value``; None if it is no buffer."""
    if isinstance(value, CpuGpuBuffer):
        buffer = copy(value)
        buffer.cpu = _like(value.cpu)
        buffer.gpu = buffer.cpu if value.gpu is value.cpu else _like(value.gpu)
        if hasattr(value, "np"):
            buffer.np = buffer.cpu.numpy()
        return buffer
    if isinstance(value, torch.Tensor):
        return _like(value)
    if isinstance(value, np.ndarray):
        return value.copy()
    return None


def _like(tensor: torch.Tensor) -> torch.Tensor:
    fresh = torch.empty_like(tensor, pin_memory=tensor.is_pinned())
    return fresh.copy_(tensor)


def _give_input_batch(twin: Any) -> None:
    """Give the twin an empty batch, with logits processors that have state of their own."""
    config = twin.vllm_config
    custom = tuple(twin.model_config.logits_processors or ())
    processors = build_logitsprocs(
        config, twin.device, is_pin_memory_available(), twin.is_pooling_model, custom
    )
    twin._init_block_sizes = []  # they differ from those in use, so a new batch is made
    twin.may_reinitialize_input_batch(twin.kv_cache_config)
    batch = twin.input_batch
    batch.logitsprocs = processors
    batch.sampling_metadata = batch._make_sampling_metadata()


def _give_metadata_builders(twin: Any) -> None:
    twin.attn_groups = [
        [
            replace(group, metadata_builders=[], kernel_block_table=None, kernel_block_offsets=None)
            for group in groups
        ]
        for groups in twin.attn_groups
    ]
    twin.initialize_metadata_builders(twin.kv_cache_config, twin._kernel_block_sizes)
