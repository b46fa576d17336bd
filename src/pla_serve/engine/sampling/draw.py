"""Random choice of tokens: temperature, min-p, top-k, top-p, and a draw by inverse CDF.

A scaled logit is (logit - peak) / (temperature * ln 2), so 2 to that power is the probability of a
token divided by that of the likeliest one. (Torch computes powers of 2 in a third of the time of
powers of e.)

Weights are these quotients in units of 2**-34, rounded down to whole numbers. Their sums stay below
2**53 for vocabularies of up to 2**19 tokens, so float64 adds them exactly. Therefore no order of
summation, batch shape or device can change which token is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pla_serve.engine.sampling.transfer import to_device
from pla_serve.wire.engine import SamplingParams

RESOLUTION = 2.0**34
"""Weight of the likeliest token."""
BLOCK = 128
"""Tokens whose weights are summed before the search looks at single tokens."""
NUCLEUS_WIDTH = 256
"""Tokens that are sorted first to find the top-p set; most sets are far smaller."""
HALVED_ROWS = 64
"""Rows that are halved together, which bounds the memory that it takes."""
UNREACHED_BITS = 0x420C0000
"""Bits of 35.0 as float32. Tokens whose scaled logit is below -34 have the weight 0."""


def draw(
    logits: torch.Tensor,
    peak: torch.Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
) -> torch.Tensor:
    """Draw one token for each row.

    Filters are applied in vLLM's order: temperature, min-p, top-k, top-p, each to the tokens that
    the one before kept. Equally likely tokens are kept or dropped together, so that results do not
    depend on the order of a sort.

    Args:
        logits: (n, vocab) float32; overwritten.
        peak: (n,), the maximum of each row.
        params: temperature (above 0), top_k, top_p and min_p of each row.
        uniforms: one random number in [0, 1) for each row.

    Returns:
        (n,) int64. A row without a finite peak gets any token.
    """
    scaled = scale(logits, peak, [p.temperature for p in params])
    keep_min_p(scaled, [p.min_p for p in params])
    keep_top_k(scaled, [p.top_k for p in params])
    weights = to_weights(scaled)
    keep_top_p(scaled, weights, [p.top_p for p in params])
    fractions = to_device(uniforms, logits.device, torch.float64)
    return pick(weights, fractions)


def scale(logits: torch.Tensor, peak: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
    """Turn logits in place into scaled logits, see the module; the likeliest token has 0."""
    factors = to_device([1 / (t * math.log(2)) for t in temperatures], logits.device, torch.float32)
    return logits.sub_(peak.unsqueeze(1)).mul_(factors.unsqueeze(1))


def to_weights(scaled: torch.Tensor) -> torch.Tensor:
    """Turn scaled logits in place into weights (n, vocab): whole numbers in float32."""
    return scaled.exp2().mul_(RESOLUTION).floor_()


def keep_min_p(scaled: torch.Tensor, min_p: Sequence[float]) -> None:
    """Drop tokens, in place, that are less likely than ``min_p`` times the likeliest one."""
    if any(min_p):
        floor = to_device(min_p, scaled.device, torch.float32).log2_()
        _drop_below(scaled, floor)


def keep_top_k(scaled: torch.Tensor, top_k: Sequence[int]) -> None:
    """Drop tokens, in place, that are less likely than the k-th; k = 0 drops none."""
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
    """Set weights to 0, in place, outside the smallest set of likeliest tokens with mass top_p.

    A token stays if the likelier tokens have less than that mass (Holtzman et al. 2020).
    """
    rows = [row for row, p in enumerate(top_p) if p < 1.0]
    if not rows:
        return
    index = to_device(rows, scaled.device)
    share = to_device([top_p[row] for row in rows], scaled.device, torch.float64)
    wanted, mass = scaled.index_select(0, index), weights.index_select(0, index)
    need = share * mass.sum(-1, dtype=torch.float64)
    floor = torch.full(scaled.shape[:1], -torch.inf, device=scaled.device)
    # On CUDA the host would have to wait to learn whether a narrow sort was enough.
    find = nucleus_floor_by_halving if wanted.is_cuda else nucleus_floor_by_sorting
    floor[index] = find(wanted, mass, need)
    weights.masked_fill_(scaled < floor.unsqueeze(1), 0.0)


def nucleus_floor_by_halving(
    scaled: torch.Tensor, weights: torch.Tensor, need: torch.Tensor
) -> torch.Tensor:
    """Return a bound (n,) such that tokens of at least this scaled logit are the top-p set.

    It halves, for each row, the range of float32 numbers in which the bound may lie, until one is
    left: 31 passes over the weights, without sorting and without waiting for the device. Absolute
    values of floats have the order of their bits as whole numbers.

    Args:
        scaled: (n, vocab) float32, at most 0.
        weights: (n, vocab) float32, of the same tokens (`to_weights`).
        need: (n,) float64, above 0 and at most the sum of the weights.
    """
    starts = range(0, len(need), HALVED_ROWS)
    parts = [slice(start, start + HALVED_ROWS) for start in starts]
    return torch.cat([_halve(scaled[part], weights[part], need[part]) for part in parts])


def _halve(scaled: torch.Tensor, weights: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    distance = scaled.abs().view(torch.int32)
    low = torch.zeros_like(need, dtype=torch.int32)
    high = torch.full_like(low, UNREACHED_BITS)
    for _ in range(31):
        middle = low + (high - low) // 2
        likelier = torch.where(distance < middle.unsqueeze(1), weights, 0.0)
        enough = likelier.sum(1, dtype=torch.float64) >= need
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return -low.view(torch.float32)


def nucleus_floor_by_sorting(
    scaled: torch.Tensor,
    weights: torch.Tensor,
    need: torch.Tensor,
    width: int = NUCLEUS_WIDTH,
) -> torch.Tensor:
    """Return the smallest scaled logit (n,) in each top-p set.

    Sorts the ``width`` likeliest tokens, and more in rows in which these lack mass. Arguments are
    those of `nucleus_floor_by_halving`.
    """
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
        floor[wider] = nucleus_floor_by_sorting(
            scaled[wider], weights[wider], need[wider], 16 * width
        )
    return floor


def pick(weights: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """Return the token at which the running sum of weights first exceeds fraction * total.

    Sums of blocks are searched first, and then one block.

    Args:
        weights: (n, vocab), as `to_weights` makes them.
        fractions: (n,) float64 in [0, 1).

    Returns:
        (n,) int64.
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
