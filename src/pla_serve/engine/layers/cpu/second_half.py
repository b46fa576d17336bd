"""What follows attention in a fused layer: an MLP, or a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pla_serve.engine.kernels.open import CpuKernels
from pla_serve.engine.layers.cpu.join import Product, gated, joined
from pla_serve.engine.layers.cpu.norm import FusedRMSNorm
from pla_serve.engine.loading.stock import require_children
from pla_serve.engine.parallel.modules import SummedBlock, unwrap
from pla_serve.engine.parallel.ranks import Ranks


class Mlp(nn.Module):
    """An MLP with the norm before it and the sum after it.

    Raises:
        AttributeError, TypeError, ValueError: the stock MLP is built in another way.
    """

    def __init__(self, stock: Any, norm: FusedRMSNorm, kernels: CpuKernels) -> None:
        super().__init__()
        require_children(stock, {"gate_proj", "up_proj", "down_proj"}, {"act_fn"})
        self.norm = norm
        down, self._ranks = unwrap(stock.down_proj)
        self.gated = gated(kernels, stock.gate_proj, stock.up_proj)
        self.down = joined(kernels, down)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return ``inputs`` (tokens, hidden) plus the MLP of their norm."""
        return plus(self.down, self.gated(inputs, self.norm), inputs, self._ranks)


class Mixture(nn.Module):
    """A stock block with a router and experts, with the norm before it and the sum after it.

    `optimise` replaces its experts and linears, as it does outside of fused layers.
    """

    def __init__(self, stock: nn.Module, norm: FusedRMSNorm) -> None:
        super().__init__()
        self.norm = norm
        self.block = stock

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return ``inputs`` (tokens, hidden) plus the block's result for their norm."""
        added: torch.Tensor = self.block(self.norm(inputs).unsqueeze(0))[0]
        return added + inputs


def second_half(stock: Any, norm: FusedRMSNorm, kernels: CpuKernels) -> Mlp | Mixture:
    """Return the fused form of the ``mlp`` of a stock layer.

    Raises:
        AttributeError, TypeError, ValueError: it has none.
    """
    if isinstance(stock, SummedBlock) or hasattr(stock, "experts"):
        return Mixture(stock, norm)
    return Mlp(stock, norm, kernels)


def plus(
    product: Product, inputs: torch.Tensor, residual: torch.Tensor, ranks: Ranks | None
) -> torch.Tensor:
    """Return the product, summed over all ranks, plus the residual, which one rank adds."""
    if ranks is None:
        return product.with_other(inputs, residual, "add")
    part = product.with_other(inputs, residual, "add") if ranks.leads else product(inputs)
    return ranks.sum_in_place(part)
