"""Log probabilities of the tokens of prompts, from the last hidden states of a batch.

The logits of all tokens of a long prompt would take gigabytes, so they are computed in slices. A
slice is a place at which something else may run first, like the boundary between two layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pla_serve.engine.batch.flat import Span, SpanRequest

SLICE_LOGITS = 1 << 23
"""Logits of one slice: 32 MiB in float32, and about three times that while they are compared."""


class ScoredTokens(NamedTuple):
    """Log probabilities of n consecutive tokens of a prompt, on the host."""

    logprobs: NDArray[np.float32]
    """(n,): of the tokens themselves."""
    ranks: NDArray[np.int32]
    """(n,): 1 for the likeliest token; equally likely ones share a rank."""
    top_ids: NDArray[np.int32]
    """(n, top): the likeliest tokens, the likeliest first."""
    top_logprobs: NDArray[np.float32]
    """(n, top)."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.logprobs)


@dataclass(frozen=True, slots=True)
class Scoring:
    """Scores of the prompts of one batch."""

    scored: Sequence[ScoredTokens | None]
    """One for each request; None where it wants no scores."""
    seconds: float
    """Time that it took, without what ran in between."""


def score_spans(
    requests: Sequence[SpanRequest],
    spans: Sequence[Span],
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    at_boundary: Callable[[], None],
    clock: Callable[[], float],
) -> Scoring:
    """Return the scores that each request asks for.

    Args:
        spans: places of the requests in the batch.
        hidden: (tokens, hidden size), of the whole batch.
        head: computes logits (rows, vocabulary) of some of these rows.
        at_boundary: called before each slice; what it raises ends the scoring.
        clock: monotonic seconds.
    """
    found: list[ScoredTokens | None] = []
    seconds = 0.0
    for request, span in zip(requests, spans, strict=True):
        wanted = request.scores
        if wanted is None:
            found.append(None)
            continue
        start = span.start + wanted.first
        rows = hidden[start : start + len(wanted.targets)]
        targets = torch.tensor(wanted.targets, device=rows.device)
        parts: list[ScoredTokens] = []
        done, size = 0, 1  # the first slice shows how wide the vocabulary is
        while done < len(rows):
            at_boundary()
            began = clock()
            logits = head(rows[done : done + size])
            parts.append(score_tokens(logits, targets[done : done + size], wanted.top))
            done += size
            size = max(1, SLICE_LOGITS // logits.shape[1])
            seconds += clock() - began
        found.append(join(parts))
    return Scoring(found, seconds)


def score_tokens(logits: torch.Tensor, targets: torch.Tensor, top: int) -> ScoredTokens:
    """Return log probabilities of ``targets`` over the whole vocabulary; waits for the device.

    Args:
        logits: (n, vocabulary).
        targets: (n,) int64.
        top: number of likeliest tokens besides each target.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, targets.unsqueeze(1))
    ranks = (logprobs > own).sum(-1) + 1
    values, ids = logprobs.topk(min(top, logits.shape[1]))
    return ScoredTokens(
        own[:, 0].cpu().numpy(),
        ranks.int().cpu().numpy(),
        ids.int().cpu().numpy(),
        values.cpu().numpy(),
    )


def join(parts: Sequence[ScoredTokens]) -> ScoredTokens:
    """Return the scores of consecutive parts of a prompt as one; there is at least one part."""
    return ScoredTokens(*(np.concatenate(each) for each in zip(*parts, strict=True)))
