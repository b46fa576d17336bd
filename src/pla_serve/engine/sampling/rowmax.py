"""Maximum of each row of logits, and the index of its first occurrence."""

from __future__ import annotations

import torch

BLOCK = 128


def row_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values (n,) and indices (n,) int64 of the row maxima; the first index wins a tie.

    On a CPU, torch finds a maximum several times faster than its index. So the maxima of blocks are
    computed first, and the index is searched in one block only.

    Args:
        logits: (n, vocab). A row with a NaN has the value NaN and any index.
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
    # A last block that is not full is extended to the left. The tokens there are smaller than the
    # maximum: otherwise their own block would have been found first.
    start = (block * BLOCK).clamp(max=vocab - BLOCK).unsqueeze(1)
    window = logits.gather(1, start + torch.arange(BLOCK, device=logits.device))
    return values, start.squeeze(1) + window.argmax(-1)
