"""Chooses the modules of a fused layer's products: of floats, or of quantised weights."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn

from pla_serve.engine.kernels.open import CpuKernels
from pla_serve.engine.layers.cpu.linear import GatedLinear, PackedLinear
from pla_serve.engine.layers.cpu.quantised import QuantisedGate, QuantisedLinear

Product = PackedLinear | QuantisedLinear


def joined(kernels: CpuKernels, *linears: Any) -> Product:
    """Return one linear with the outputs of all these, one after another.

    Raises:
        ValueError: some have a bias and some have none.
        TypeError: some are quantised and some are not.
    """
    if _all_quantised(linears):
        return QuantisedLinear.joined(*linears)
    return PackedLinear.of(*linears, kernels=kernels)


def gated(kernels: CpuKernels, gate: Any, up: Any) -> GatedLinear | QuantisedGate:
    """Return the gated part of an MLP.

    Raises:
        ValueError: it has no fused form.
        TypeError: one linear is quantised and the other is not.
    """
    if _all_quantised((gate, up)):
        return QuantisedGate(gate, up)
    return GatedLinear(gate, up, kernels)


def reordered(linear: Any, order: torch.Tensor) -> Any:
    """Return the linear with the outputs of each head in this order."""
    rows = torch.arange(linear.out_features).view(-1, len(order))[:, order].flatten()
    if isinstance(linear, QuantisedLinear):
        return linear.reordered(rows)
    made: Any = nn.Linear(1, 1, bias=False, device="meta")
    made.in_features, made.out_features = linear.in_features, linear.out_features
    made.weight = nn.Parameter(linear.weight[rows], requires_grad=False)
    made.bias = None if linear.bias is None else nn.Parameter(linear.bias[rows], False)
    return made


def _all_quantised(linears: tuple[Any, ...]) -> TypeGuard[tuple[QuantisedLinear, ...]]:
    kinds = {isinstance(linear, QuantisedLinear) for linear in linears}
    if len(kinds) > 1:
        raise TypeError("some weights of a product are quantised and some are not")
    return kinds == {True}
