"""Replaces stock modules by faster ones on a CPU: same parameters, same results up to rounding."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from pla_serve.engine.attention.interface import IMPLEMENTATION
from pla_serve.engine.kernels.open import TORCH_ALONE, CpuKernels
from pla_serve.engine.layers.cpu.experts import ExpertMlps, experts_of
from pla_serve.engine.layers.cpu.layer import FusedLayer, TurningRotary
from pla_serve.engine.layers.cpu.linear import PackedLinear, packs
from pla_serve.engine.layers.cpu.norm import FusedRMSNorm, rms_epsilon
from pla_serve.engine.layers.cpu.probe import same_results
from pla_serve.engine.loading.stock import rotary_owner

__all__ = ["ExpertMlps", "FusedLayer", "FusedRMSNorm", "PackedLinear", "optimise"]


def optimise(
    model: nn.Module, kernels: CpuKernels = TORCH_ALONE, keep: nn.Module | None = None
) -> int:
    """Replace modules of ``model``, which is on the CPU, by faster ones.

    Args:
        kernels: used where they support the shapes and types of the model.
        keep: a submodule that stays as it is.

    Returns:
        The number of decoder layers that were replaced as a whole.
    """
    with torch.inference_mode(False), torch.no_grad():
        fused = _fuse_layers(model, kernels) if keep is None else 0
        _replace(model, kernels, keep)
    return fused


def _fuse_layers(model: nn.Module, kernels: CpuKernels) -> int:
    """Replace each decoder layer whose fused form gives the same results; return how many."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != IMPLEMENTATION:
        return 0
    owner: Any = rotary_owner(model)
    if owner is None or not packs(next(model.parameters()).dtype):
        return 0
    rotary = owner.rotary_emb = TurningRotary(owner.rotary_emb)
    replaced = 0
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for index, stock in enumerate(layers):
            fused = _fused(stock, kernels)
            if fused is not None and same_results(stock, fused, rotary):
                fused.is_last = index == len(layers) - 1
                layers[index] = fused
                replaced += 1
    return replaced


def _fused(stock: nn.Module, kernels: CpuKernels) -> FusedLayer | None:
    try:
        return FusedLayer(stock, kernels)
    except (AttributeError, TypeError, ValueError):
        return None


def _replace(parent: nn.Module, kernels: CpuKernels, keep: nn.Module | None) -> None:
    for name, child in parent.named_children():
        if child is keep:
            continue
        if type(child) is nn.Linear and packs(child.weight.dtype):
            setattr(parent, name, PackedLinear.of(child, kernels=kernels))
        elif (epsilon := rms_epsilon(child)) is not None:
            weight = cast("torch.Tensor", child.weight)
            setattr(parent, name, FusedRMSNorm(weight, epsilon, kernels.vectors))
        elif (experts := experts_of(child, kernels)) is not None:
            setattr(parent, name, experts)
        else:
            _replace(child, kernels, keep)
