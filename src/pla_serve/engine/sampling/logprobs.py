"""Log-probabilities of chosen tokens and of the likeliest ones, from the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pla_serve.wire.engine import TokenLogprob


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, tops: Sequence[int]
) -> list[TokenLogprob]:
    """Log-softmax over the whole vocabulary, before any penalty or filter.

    Args:
        logits: (n, vocab) float32, untouched.
        tokens: (n,) int64, the chosen ones.
        tops: how many of the likeliest tokens each row wants beside the chosen one.

    Returns:
        One a row. The rank is 1 for the likeliest; equally likely tokens share the better rank.
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    rank = (logprobs > chosen).sum(-1, keepdim=True) + 1
    width = min(max(tops), logits.shape[1])
    values, ids = logprobs.topk(width)
    # float64 holds token ids and float32 values exactly, so one transfer brings everything.
    packed = torch.cat([part.double() for part in (chosen, rank, values, ids)], dim=1).tolist()
    return [
        TokenLogprob(
            logprob=row[0],
            rank=int(row[1]),
            top=[(int(row[2 + width + i]), row[2 + i]) for i in range(min(top, width))],
        )
        for row, top in zip(packed, tops, strict=True)
    ]
