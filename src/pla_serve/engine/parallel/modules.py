"""Modules that join the shares of all ranks: sums in each layer, and the output matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from pla_serve.engine.parallel.ranks import Ranks


class SummedLinear(nn.Module):
    """Linear over this rank's share of the inputs; its outputs are summed over all ranks."""

    def __init__(self, linear: nn.Linear, ranks: Ranks) -> None:
        super().__init__()
        self.linear = linear
        self.ranks = ranks

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (..., in / ranks) to (..., out)."""
        return self.ranks.sum_in_place(self.linear(inputs))


class SummedBlock(nn.Module):
    """Mixture of experts with this rank's share of each expert; outputs are summed over ranks.

    The router is whole on each rank, so that all ranks choose the same experts.
    """

    def __init__(self, block: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.block = block
        self.ranks = ranks

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (..., hidden) to (..., hidden)."""
        return self.ranks.sum_in_place(self.block(inputs).contiguous())


def unwrap(linear: Any) -> tuple[Any, Ranks | None]:
    """Return the linear inside, and the ranks to sum over; None for an ordinary linear."""
    return (linear.linear, linear.ranks) if isinstance(linear, SummedLinear) else (linear, None)


class GatheredHead(nn.Module):
    """Output matrix of which each rank has some rows, so it computes logits of some tokens.

    Rank 0 gets all logits. On other ranks the result has the same shape and undefined values.
    """

    def __init__(self, linear: nn.Linear, ranks: Ranks, vocab_size: int) -> None:
        super().__init__()
        self.linear = linear
        self._ranks = ranks
        self._vocab_size = vocab_size
        self._widths = [
            end - start
            for start, end in (
                vocabulary(vocab_size, rank, ranks.size) for rank in range(ranks.size)
            )
        ]

    @property
    def weight(self) -> torch.Tensor:
        """Rows of this rank."""
        weight: torch.Tensor = self.linear.weight
        return weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (..., rows, hidden) to (..., rows, vocabulary)."""
        own: torch.Tensor = self.linear(inputs)
        if own.numel() == 0:
            return own.new_empty(*own.shape[:-1], self._vocab_size)
        widest = max(self._widths)
        if own.shape[-1] < widest:
            own = pad(own, (0, widest - own.shape[-1]))
        parts = self._ranks.gather(own)
        if not parts:
            return own.new_empty(*own.shape[:-1], self._vocab_size)
        return torch.cat(
            [part[..., :width] for part, width in zip(parts, self._widths, strict=True)], -1
        )


def vocabulary(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the first token id of a rank and the one after its last; sizes differ by 1 at most."""
    return size * rank // ranks, size * (rank + 1) // ranks


def join(model: Any, layers: nn.ModuleList, ranks: Ranks) -> None:
    """Add the sums over ranks to a model that has this rank's share of each layer."""
    for layer in layers:
        parts: Any = layer
        parts.self_attn.o_proj = SummedLinear(parts.self_attn.o_proj, ranks)
        if hasattr(parts.mlp, "experts"):
            parts.mlp = SummedBlock(parts.mlp, ranks)
        else:
            parts.mlp.down_proj = SummedLinear(parts.mlp.down_proj, ranks)
