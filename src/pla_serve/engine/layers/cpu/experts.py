"""The experts of a mixture on a CPU: one gated MLP for each expert that some token chose.

``transformers`` multiplies all experts in one grouped product, for which torch has no kernel that
keeps weights packed: each of its parts packs its weights again. Here every expert is a pair of
modules as a dense MLP has them, so that it gets the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pla_serve.engine.kernels.open import TORCH_ALONE, CpuKernels
from pla_serve.engine.layers.cpu.join import gated, joined
from pla_serve.engine.loading.mixtures import is_experts, linears_of

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference from the stock module, as a share of the largest output."""
PROBE_TOKENS = 6
PROBE_CHOICES = 2


class ExpertMlps(nn.Module):
    """The MLPs of all experts of one layer, in place of the stock ``experts`` module.

    Tokens are sorted by expert, so each expert that was chosen is multiplied once a batch, by all
    tokens that chose it. What a token gets is summed in the order in which its router chose, so
    it does not depend on the other tokens.

    Args:
        experts: for each expert the linears that make the gate, what is gated, and the output.
        kernels: used if they fit the weights.
    """

    def __init__(self, experts: Sequence[Sequence[Any]], kernels: CpuKernels = TORCH_ALONE) -> None:
        super().__init__()
        self.gated = nn.ModuleList(gated(kernels, gate, up) for gate, up, _ in experts)
        self.down = nn.ModuleList(joined(kernels, down) for _, _, down in experts)
        # Indexing a ModuleList takes as long as a small product.
        self._each = list(zip(self.gated, self.down, strict=True))

    def forward(
        self, hidden: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the outputs of the experts that each token chose.

        Args:
            hidden: (tokens, hidden).
            choices: (tokens, experts per token), int64: the numbers of the experts.
            weights: (tokens, experts per token).

        Returns:
            (tokens, hidden) in the dtype of ``hidden``.
        """
        tokens, each = choices.shape
        if tokens == 0:
            return hidden
        if tokens == 1:
            outputs = torch.cat([self._mlp(e, hidden) for e in choices[0].tolist()])
            return outputs.mul(weights.view(-1, 1)).sum(0, keepdim=True).to(hidden.dtype)
        chosen = choices.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self._each)).tolist()
        parts = torch.split(hidden[order // each], counts)
        outputs = torch.cat([self._mlp(e, part) for e, part in enumerate(parts) if len(part)])
        placed = torch.empty_like(outputs)
        placed[order] = outputs
        weighted = placed.view(tokens, each, -1).mul(weights.unsqueeze(-1))
        return weighted.sum(1).to(hidden.dtype)

    def _mlp(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        gates, down = self._each[expert]
        outputs: torch.Tensor = down(gates(inputs, None))
        return outputs


def experts_of(stock: nn.Module, kernels: CpuKernels) -> ExpertMlps | None:
    """Return the faster form of a stock ``experts`` module.

    Returns:
        None if ``stock`` is another module, or has experts of another form, or the results of
        both differ on random inputs.
    """
    if not is_experts(stock):
        return None
    try:
        made = ExpertMlps(linears_of(stock), kernels)
    except (AttributeError, TypeError, ValueError):
        return None
    return made if _same_results(stock, made) else None


def _same_results(stock: Any, made: ExpertMlps) -> bool:
    weight = stock.down_proj
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(PROBE_TOKENS, weight.shape[1], generator=generator).to(weight.dtype)
    most = min(PROBE_CHOICES, len(weight))
    scores = torch.rand(PROBE_TOKENS, len(weight), generator=generator)
    shares, choices = scores.topk(most)
    for tokens in (1, PROBE_TOKENS):
        arguments = hidden[:tokens], choices[:tokens], shares[:tokens].to(weight.dtype)
        expected, got = stock(*arguments), made(*arguments)
        tolerance = TOLERANCE[weight.dtype] * expected.abs().max()
        if expected.shape != got.shape or not bool((expected - got).abs().max() <= tolerance):
            return False
    return True
