"""The largest logit of each row and the first place where it stands."""

from __future__ import annotations

import torch

BLOCK = 128


def row_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (n,) and indices (n,) int64 of the row maxima; the first index wins a tie.

    ``logits`` is (n, vocab). A row that holds a NaN has the value NaN and some index.

    On a CPU torch finds a maximum several times faster than its index. So the maxima of blocks are
    taken first, and the index is searched for in one block only.
    """
    vocab = logits.shape[1]
    if logits.device.type != "cpu" or vocab < 2 * BLOCK:
        values, indices = logits.max(dim=-1)
        return values, indices
    whole = vocab - vocab % BLOCK
    maxima = logits[:, :whole].reshape(len(logits), -1, BLOCK).amax(-1)
    if whole < vocab:
        maxima = torch.cat((maxima, logits[:, whole:].amax(-1, keepdim=True)), dim=1)
    values, block = maxima.max(dim=-1)
    # The window of a ragged last block reaches back into the block before it. That one's maximum is
    # smaller, or it would have been the first.
    start = (block * BLOCK).clamp(max=vocab - BLOCK).unsqueeze(1)
    window = logits.gather(1, start + torch.arange(BLOCK, device=logits.device))
    return values, start.squeeze(1) + window.argmax(-1)
