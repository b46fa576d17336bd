"""Counters of captured shapes and compiled layers, for metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class GridCounts:
    """Counters since the start."""

    replays: Counter[str] = field(default_factory=Counter)
    """Replays by shape, such as ``64x4`` for 64 tokens of 4 requests."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Batches that ran on the ordinary kernels, by reason."""
    real_tokens: int = 0
    """Tokens of batches that ran on captured shapes."""
    padding_tokens: int = 0
    """Padding tokens in them."""
    compile_failures: int = 0
    """Times that compiled layers were given up for the eager ones."""
