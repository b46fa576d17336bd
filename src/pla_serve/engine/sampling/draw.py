"""Temperature, min-p, top-k, top-p, and the draw by inverse CDF; all rows at once.

A scaled logit is (logit - peak) / (temperature * ln 2), so 2 to its power is a probability in units
of the likeliest token's. (Powers of 2 take torch a third of the time of powers of e.)

Weights are whole numbers: these powers in units of 2**-34, rounded down. Sums of them stay below
2**53 for any vocabulary up to 2**19, so float64 adds them exactly and no order of summation, batch
shape or device can change which token is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pla_serve.engine.sampling.transfer import to_device
from pla_serve.wire.engine import SamplingParams

RESOLUTION = 2.0**34
BLOCK = 128
NUCLEUS_WIDTH = 256
"""Tokens that are sorted first to find a nucleus; most are far smaller."""


def draw(
    logits: torch.Tensor,
    peak: torch.Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
) -> torch.Tensor:
    """Draw one token a row.

    The order is vLLM's: temperature, min-p, top-k, top-p, each on what the one before left.
    Tokens equally likely are kept or dropped together, so the order of a sort never shows.

    Args:
        logits: (n, vocab) float32; overwritten.
        peak: (n,) the row maxima.
        params: temperature (above 0), top_k, top_p and min_p of each row.
        uniforms: a number in [0, 1) for each row.

    Returns:
        (n,) int64. Rows without a finite peak get any token.
    """
    scaled = scale(logits, peak, [p.temperature for p in params])
    keep_min_p(scaled, [p.min_p for p in params])
    keep_top_k(scaled, [p.top_k for p in params])
    weights = to_weights(scaled)
    keep_top_p(scaled, weights, [p.top_p for p in params])
    fractions = to_device(uniforms, logits.device, torch.float64)
    return pick(weights, fractions)


def scale(logits: torch.Tensor, peak: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
    """Logarithms, to base 2, of how likely tokens are beside the likeliest; in place."""
    factors = to_device([1 / (t * math.log(2)) for t in temperatures], logits.device, torch.float32)
    return logits.sub_(peak.unsqueeze(1)).mul_(factors.unsqueeze(1))


def to_weights(scaled: torch.Tensor) -> torch.Tensor:
    """(n, vocab) float32 whole numbers, RESOLUTION for the likeliest token."""
    return scaled.exp2().mul_(RESOLUTION).floor_()


def keep_min_p(scaled: torch.Tensor, min_p: Sequence[float]) -> None:
    """Drop, in place, tokens less likely than ``min_p`` times the likeliest (its logit is 0)."""
    if any(min_p):
        floor = to_device(min_p, scaled.device, torch.float32).log2_()
        _drop_below(scaled, floor)


def keep_top_k(scaled: torch.Tensor, top_k: Sequence[int]) -> None:
    """Drop, in place, tokens less likely than the k-th; k of 0 or at least the vocabulary: none."""
    vocab = scaled.shape[1]
    rows = [row for row, k in enumerate(top_k) if 0 < k < vocab]
    if not rows:
        return
    index = to_device(rows, scaled.device)
    place = to_device([top_k[row] - 1 for row in rows], scaled.device)
    best = scaled.index_select(0, index).topk(max(top_k[row] for row in rows)).values
    floor = torch.full(scaled.shape[:1], -torch.inf, device=scaled.device)
    floor[index] = best.gather(1, place.unsqueeze(1)).squeeze(1)
    _drop_below(scaled, floor)


def keep_top_p(scaled: torch.Tensor, weights: torch.Tensor, top_p: Sequence[float]) -> None:
    """Zero the weights, in place, outside the smallest set of likeliest tokens with mass top_p.

    A token stays if those likelier than it have less than that mass (Holtzman et al. 2020).
    """
    rows = [row for row, p in enumerate(top_p) if p < 1.0]
    if not rows:
        return
    index = to_device(rows, scaled.device)
    share = to_device([top_p[row] for row in rows], scaled.device, torch.float64)
    wanted, mass = scaled.index_select(0, index), weights.index_select(0, index)
    need = share * mass.sum(-1, dtype=torch.float64)
    floor = torch.full(scaled.shape[:1], -torch.inf, device=scaled.device)
    # Whether a narrow sort was enough is known on the device only; asking makes the host wait.
    width = wanted.shape[1] if wanted.is_cuda else NUCLEUS_WIDTH
    floor[index] = _nucleus_floor(wanted, mass, need, width)
    weights.masked_fill_(scaled < floor.unsqueeze(1), 0.0)


def _nucleus_floor(
    scaled: torch.Tensor, weights: torch.Tensor, need: torch.Tensor, width: int
) -> torch.Tensor:
    """(n,) the smallest logit in each nucleus; sorts ``width`` tokens, more where mass lacks."""
    width = min(width, scaled.shape[1])
    values, ids = scaled.topk(width)
    each = weights.gather(1, ids).double()
    mass = each.cumsum(1)
    kept = (mass - each < need.unsqueeze(1)).sum(1).clamp_(min=1)
    floor = values.gather(1, (kept - 1).unsqueeze(1)).squeeze(1)
    if width == scaled.shape[1]:
        return floor
    wider = (mass[:, -1] < need).nonzero().squeeze(1)
    if len(wider):
        floor[wider] = _nucleus_floor(scaled[wider], weights[wider], need[wider], 16 * width)
    return floor


def pick(weights: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """The token at which the running sum of weights first exceeds fraction * total.

    Sums blocks first and then searches one of them. ``weights`` is (n, vocab) as ``to_weights``
    makes it, ``fractions`` (n,) float64 in [0, 1). Returns (n,) int64.
    """
    rows, vocab = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -vocab % BLOCK)).view(rows, -1, BLOCK)
    upto = blocks.sum(-1, dtype=torch.float64).cumsum(1)
    target = (fractions * upto[:, -1]).unsqueeze(1)
    block = torch.searchsorted(upto, target, right=True).clamp_(max=upto.shape[1] - 1)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK)).squeeze(1).double()
    rest = target - (upto.gather(1, block) - inside.sum(-1, keepdim=True))
    place = torch.searchsorted(inside.cumsum(1), rest, right=True)
    return (block * BLOCK + place).squeeze(1).clamp_(max=vocab - 1)


def _drop_below(scaled: torch.Tensor, floor: torch.Tensor) -> None:
    scaled.masked_fill_(scaled < floor.unsqueeze(1), -torch.inf)
