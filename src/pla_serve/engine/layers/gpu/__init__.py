"""Faster modules for a GPU in place of stock ones; same parameters, same results up to rounding."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from pla_serve.engine.attention.interface import IMPLEMENTATION
from pla_serve.engine.layers.gpu.layer import GpuLayer
from pla_serve.engine.layers.gpu.operations import Operations, TorchOperations
from pla_serve.engine.layers.gpu.probe import same_results

log = logging.getLogger(__name__)

__all__ = ["GpuLayer", "best_operations", "optimise"]


def best_operations() -> Operations:
    """The Triton kernels, where Triton is installed."""
    if find_spec("triton") is None:
        return TorchOperations()
    from pla_serve.engine.layers.gpu.triton_operations import TritonOperations

    return TritonOperations()


@torch.no_grad()
def optimise(model: nn.Module, operations: Operations) -> int:
    """Fuse the decoder layers of ``model`` that can be; returns how many.

    Each is run beside the stock layer before it takes its place; one that computes something else
    stays as it is.
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != IMPLEMENTATION:
        return 0
    owners = [m for m in model.modules() if isinstance(getattr(m, "rotary_emb", None), nn.Module)]
    if len(owners) != 1:
        return 0
    rotary: Any = owners[0].rotary_emb
    replaced = 0
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for index, stock in enumerate(layers):
            try:
                fused = GpuLayer(stock, operations)
            except (AttributeError, TypeError, ValueError) as error:
                log.info("layer %d stays as it is: %s", index, error)
                continue
            difference = same_results(stock, fused, rotary)
            if difference is not None:
                log.warning("layer %d stays as it is: fused, it differs by %s", index, difference)
                continue
            layers[index] = fused  # the stock weights are freed layer by layer
            replaced += 1
    return replaced
