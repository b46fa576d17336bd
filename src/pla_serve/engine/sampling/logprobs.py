"""Log probabilities of chosen and of likeliest tokens, from the unchanged logits of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pla_serve.wire.engine import TokenLogprob


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, tops: Sequence[int]
) -> list[TokenLogprob]:
    """Return log probabilities over the whole vocabulary, before penalties and filters.

    Args:
        logits: (n, vocab) float32; not changed.
        tokens: (n,) int64: the chosen tokens.
        tops: number of likeliest tokens that each row wants besides the chosen one.

    Returns:
        One result for each row. The likeliest token has rank 1; equally likely ones share a rank.
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    rank = (logprobs > chosen).sum(-1, keepdim=True) + 1
    width = min(max(tops), logits.shape[1])
    values, ids = logprobs.topk(width)
    # float64 represents ids and float32 values exactly, so one copy from the device is enough.
    packed = torch.cat([part.double() for part in (chosen, rank, values, ids)], dim=1).tolist()
    return [
        TokenLogprob(
            logprob=row[0],
            rank=int(row[1]),
            top=[(int(row[2 + width + i]), row[2 + i]) for i in range(min(top, width))],
        )
        for row, top in zip(packed, tops, strict=True)
    ]
