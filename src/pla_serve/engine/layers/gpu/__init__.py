"""Replaces stock decoder layers by fused ones on a GPU: same results up to rounding."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from pla_serve.engine.attention.interface import IMPLEMENTATION
from pla_serve.engine.device.errors import first_line
from pla_serve.engine.layers.gpu.layer import GpuLayer
from pla_serve.engine.layers.gpu.operations import Operations, TorchOperations
from pla_serve.engine.layers.gpu.probe import same_results
from pla_serve.engine.loading.stock import rotary_owner

log = logging.getLogger(__name__)

__all__ = ["GpuLayer", "best_operations", "optimise"]


def best_operations() -> Operations:
    """Return the Triton kernels if Triton is installed, and plain torch otherwise."""
    if find_spec("triton") is None:
        return TorchOperations()
    from pla_serve.engine.layers.gpu.triton_operations import TritonOperations

    return TritonOperations()


@torch.no_grad()
def optimise(model: nn.Module, operations: Operations) -> int:
    """Replace decoder layers of ``model`` by fused ones; return how many were replaced.

    Each fused layer is compared with the stock one first. A layer that is built in another way, or
    whose results differ, stays as it is. If the kernels of ``operations`` do not run here (Triton
    needs a C compiler at run time, for example), torch's operations take their place.
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != IMPLEMENTATION:
        return 0
    owner: Any = rotary_owner(model)
    if owner is None:
        return 0
    rotary = owner.rotary_emb
    operations = _that_run(operations, model, rotary)
    replaced = 0
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for index, stock in enumerate(layers):
            try:
                fused = GpuLayer(stock, operations)
            except (AttributeError, TypeError, ValueError) as error:
                log.info("layer %d stays as it is: %s", index, error)
                continue
            difference = _difference(stock, fused, rotary)
            if difference is not None:
                log.warning("layer %d stays as it is: fused, it differs by %s", index, difference)
                continue
            layers[index] = fused  # the stock weights are freed layer by layer
            replaced += 1
    return replaced


def _that_run(operations: Operations, model: nn.Module, rotary: Any) -> Operations:
    """Return ``operations`` if a first layer runs with them, or else those of torch."""
    for stock in (
        m for layers in model.modules() if isinstance(layers, nn.ModuleList) for m in layers
    ):
        try:
            fused = GpuLayer(stock, operations)
        except (AttributeError, TypeError, ValueError):
            continue
        try:
            same_results(stock, fused, rotary)
        except Exception as error:  # a compiler, a driver or a library may raise anything
            log.warning(
                "the kernels of fused layers do not run here, torch's are used: %s",
                first_line(error),
            )
            return TorchOperations()
        return operations
    return operations


def _difference(stock: nn.Module, fused: GpuLayer, rotary: Any) -> str | None:
    """Return how the results of both layers differ, as text; None if they do not."""
    try:
        return same_results(stock, fused, rotary)
    except Exception as error:  # a compiler, a driver or a library may raise anything
        return f"an error, {first_line(error)}"
