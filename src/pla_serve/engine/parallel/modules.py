"""What makes a model of one rank's weights compute the whole: sums behind two products a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from pla_serve.engine.parallel.ranks import Ranks


class SummedLinear(nn.Module):
    """A linear over this rank's share of the inputs; the outputs are the sum over all ranks."""

    def __init__(self, linear: nn.Linear, ranks: Ranks) -> None:
        super().__init__()
        self.linear = linear
        self.ranks = ranks

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in / ranks) to (..., out)."""
        return self.ranks.sum_in_place(self.linear(inputs))


def unwrap(linear: Any) -> tuple[Any, Ranks | None]:
    """A linear, and the ranks over which its outputs still have to be summed, if it has any."""
    return (linear.linear, linear.ranks) if isinstance(linear, SummedLinear) else (linear, None)


class GatheredHead(nn.Module):
    """The output matrix by rows: each rank computes the logits of a part of the vocabulary.

    Rank 0 gets them all. On others the result has the same shape, and means nothing.
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
        """This rank's rows."""
        weight: torch.Tensor = self.linear.weight
        return weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., rows, hidden) to (..., rows, vocabulary)."""
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
    """First token id of a rank, and the one behind its last; no two ranks differ by more than 1."""
    return size * rank // ranks, size * (rank + 1) // ranks


def join(model: Any, layers: nn.ModuleList, ranks: Ranks) -> None:
    """Put the sums into a model that holds this rank's share of each layer's weights."""
    for layer in layers:
        parts: Any = layer
        parts.self_attn.o_proj = SummedLinear(parts.self_attn.o_proj, ranks)
        parts.mlp.down_proj = SummedLinear(parts.mlp.down_proj, ranks)
