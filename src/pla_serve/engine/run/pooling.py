"""Embeddings of prompts: last hidden states of tokens, added up over the chunks of a prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pla_serve.engine.batch.flat import Span, SpanRequest
from pla_serve.wire.engine import Pooling

HiddenSum = NDArray[np.float64]
"""(hidden size,)"""


@dataclass(slots=True)
class HiddenPool:
    """Hidden states of one prompt that are added up, in the order of its tokens.

    Example: of a prompt of 10 tokens, of which a first chunk computes 6, mean pooling adds those of
    6 and then of 4::

        pool = HiddenPool.of("mean", 10)
        pool.wanted(0, 6)  # (0, 6)
        pool.add(total, 6)
        pool.wanted(6, 4)  # (0, 4), counted from the first new token
    """

    first: int
    """First token of the prompt that takes part."""
    end: int
    """Token after the last one that does."""
    done: int = 0
    """Tokens that are added up."""
    total: HiddenSum | None = None

    @classmethod
    def of(cls, kind: Pooling, tokens: int) -> HiddenPool:
        """Return the pool of a prompt of so many tokens."""
        if kind == "last":
            return cls(tokens - 1, tokens)
        return cls(0, tokens if kind == "mean" else 1)

    @property
    def next(self) -> int:
        """First token of the prompt whose hidden state is still needed."""
        return self.first + self.done

    def wanted(self, history: int, tokens: int) -> tuple[int, int] | None:
        """Return which of ``tokens`` new ones after ``history`` take part, as (first, end).

        None if none do, or if they have been added up already.
        """
        first, end = max(history, self.next), min(history + tokens, self.end)
        return (first - history, end - history) if first < end else None

    def add(self, total: HiddenSum, tokens: int) -> None:
        """Add the sum of the hidden states of the next ``tokens``."""
        self.total = total if self.total is None else self.total + total
        self.done += tokens

    def mean(self) -> NDArray[np.float32]:
        """Return the embedding, (hidden size,). All hidden states must have been added.

        Raises:
            RuntimeError: some have not.
        """
        if self.total is None or self.next < self.end:
            raise RuntimeError(f"{self.done} of {self.end - self.first} hidden states were pooled")
        return (self.total / self.done).astype(np.float32)


def pool_spans(
    requests: Sequence[SpanRequest], spans: Sequence[Span], hidden: torch.Tensor
) -> list[HiddenSum | None]:
    """Return the sum of hidden states that each request asks for; waits for the device.

    Args:
        spans: places of the requests in the batch.
        hidden: (tokens, hidden size), of the whole batch.
    """
    found: list[HiddenSum | None] = []
    for request, span in zip(requests, spans, strict=True):
        if request.pooled is None:
            found.append(None)
            continue
        first, end = request.pooled
        rows = hidden[span.start + first : span.start + end]
        found.append(rows.double().sum(dim=0).cpu().numpy())
    return found
