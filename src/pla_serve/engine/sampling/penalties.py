"""Changes of single logits before a token is chosen: bias, minimum length, penalties.

Only the logits of tokens that a sequence has seen are touched, not the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pla_serve.engine.sampling.transfer import to_device


class TokenCounts:
    """Tokens that a sequence has seen, each with its number of occurrences in the output.

    Args:
        prompt: token ids of the prompt, which start with a count of 0.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        seen = dict.fromkeys(prompt)
        self._slots = {token: slot for slot, token in enumerate(seen)}
        self._size = len(seen)
        capacity = max(64, 2 * self._size)
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._ids[: self._size] = list(seen)
        self._counts = np.zeros(capacity, dtype=np.float32)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Distinct token ids (n,) in the order in which they were seen."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """Occurrences in the output (n,), in the order of ``ids``."""
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        """Count one more output token."""
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = self._size
            if slot == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[slot] = token
            self._size += 1
        self._counts[slot] += 1


class Penalties:
    """Presence, frequency and repetition penalty of one sequence, and its token counts."""

    def __init__(
        self, prompt: Sequence[int], *, presence: float, frequency: float, repetition: float
    ) -> None:
        self.presence = presence
        self.frequency = frequency
        self.repetition = repetition
        # Only the repetition penalty looks at the prompt.
        self.seen = TokenCounts(prompt if repetition != 1.0 else ())


class Additions:
    """Values to add to single logits of one row, as arrays that are made once for all steps.

    Example: ``Additions({5: 1.5})`` favours token 5, ``Additions({0: -inf})`` excludes token 0.
    """

    def __init__(self, values: Mapping[int, float]) -> None:
        self.ids = np.fromiter(values.keys(), dtype=np.int64, count=len(values))
        """Token ids (n,)."""
        self.values = np.fromiter(values.values(), dtype=np.float32, count=len(values))
        """A value for each of them."""


def add_to_logits(logits: torch.Tensor, additions: Sequence[tuple[int, Additions]]) -> None:
    """Add values to single logits, in place: one tensor for the whole batch.

    Args:
        logits: (n, vocab) float32, contiguous.
        additions: (row, values to add there); a row may have several.
    """
    vocab, device = logits.shape[1], logits.device
    places = np.concatenate([one.ids + row * vocab for row, one in additions])
    values = np.concatenate([one.values for _, one in additions])
    logits.view(-1).index_add_(
        0, to_device(places, device), to_device(values, device, torch.float32)
    )


def penalise(logits: torch.Tensor, penalties: Sequence[tuple[int, Penalties]]) -> None:
    """Apply the penalties of some rows, in place.

    The repetition penalty divides positive logits of seen tokens and multiplies negative ones
    (Keskar et al. 2019, arXiv 1909.05858, with the correction for negative logits that all engines
    use). Then frequency * count is subtracted, and presence if the output has the token (OpenAI).

    Args:
        logits: (n, vocab) float32, contiguous.
        penalties: (row, penalties of that row).
    """
    vocab = logits.shape[1]
    places = np.concatenate([p.seen.ids + row * vocab for row, p in penalties])
    if places.size == 0:
        return
    sizes = [p.seen.ids.size for _, p in penalties]
    counts = np.concatenate([p.seen.counts for _, p in penalties])
    repetition = np.repeat([p.repetition for _, p in penalties], sizes)
    off = np.repeat([p.frequency for _, p in penalties], sizes) * counts
    off += np.repeat([p.presence for _, p in penalties], sizes) * (counts > 0)
    device = logits.device
    index = to_device(places, device)
    factor = to_device(repetition, device, torch.float32)
    flat = logits.view(-1)
    old = flat[index]
    new = torch.where(old > 0, old / factor, old * factor)
    flat[index] = new - to_device(off, device, torch.float32)
