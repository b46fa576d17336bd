"""What became of captured shapes and compiled layers, for metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class GridCounts:
    """What happened so far."""

    replays: Counter[str] = field(default_factory=Counter)
    """By shape, as ``tokens x requests``."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Batches that ran on the ordinary kernels, by reason."""
    real_tokens: int = 0
    padding_tokens: int = 0
    compile_failures: int = 0
    """Times that compiled layers were given up for those that they were made from."""
