"""Attention of models in which some layers have a window: their tokens see the latest tokens only.

KV of all tokens is kept, as in layers without a window, so that prefixes are reused and sequences
are transferred in the same way. A layer with a window reads only the part that its tokens see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from pla_serve.engine.attention.interface import AttentionBackend
from pla_serve.engine.attention.sdpa import grouped_context
from pla_serve.engine.batch.flat import FlatBatch, Span
from pla_serve.engine.kv.blocks import BlockRun
from pla_serve.engine.kv.cache import KVCache

LEAST_PIECE = 16
MOST_PIECE = 128
"""Bounds of the new tokens that are attended by one masked call. The call computes scores of
window + piece keys for each of them, of which a token sees no more than its window."""


class WindowedAttention:
    """Attends each layer with its own window.

    Args:
        windows: for each layer the number of latest tokens, a token itself included, that the token
            sees; None for all.
        make: makes a backend that attends whole contexts and reads `FlatBatch.spans`.
    """

    def __init__(self, windows: Sequence[int | None], make: Callable[[], AttentionBackend]) -> None:
        # Backends keep what they computed for a batch, so those of different spans are apart.
        backends = {
            window: make() if window is None else OneWindow(window, make())
            for window in set(windows)
        }
        self._backends = [backends[window] for window in windows]

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        return self._backends[layer].attend(layer, query, cache, batch, scaling)


@dataclass(frozen=True, slots=True)
class _Split:
    """Sequences of a batch, by what attends them."""

    whole: FlatBatch
    """Those in which each new token sees all that is left of the context: the tokens before the
    window of the first new token are cut off. They need no mask."""
    rows: torch.Tensor | None
    """(tokens,) int64: positions of the tokens of ``whole`` in the batch; None if it has all."""
    masked: tuple[Span, ...]
    """Those in which new tokens see different parts of the context."""


class OneWindow:
    """Attention with one window.

    Decode steps, and sequences that are no longer than the window, are attended by ``backend`` over
    a context without the tokens that no new token sees. Longer prefills are attended by torch with
    a mask, some tokens at a time.

    Args:
        window: number of latest tokens, a token itself included, that a token sees.
        backend: attends whole contexts.
    """

    def __init__(self, window: int, backend: AttentionBackend) -> None:
        self._window = window
        self._backend = backend
        self._piece = min(MOST_PIECE, max(LEAST_PIECE, window))
        self._last: tuple[FlatBatch, _Split] | None = None
        self._mask: torch.Tensor | None = None
        """Mask of the longest piece, of which all others are parts."""

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        split = self._split(batch)
        if not split.masked:
            return self._backend.attend(layer, query, cache, split.whole, scaling)
        heads, tokens, dim = query.shape
        output = query.new_empty(tokens, heads, dim)
        if split.rows is not None and len(split.rows):
            own = query[:, split.rows]
            output[split.rows] = self._backend.attend(layer, own, cache, split.whole, scaling)
        keys, values = cache.keys[layer], cache.values[layer]
        for span in split.masked:
            for start, attended in self._attend_masked(query, keys, values, span, scaling):
                output[start : start + len(attended)] = attended
        return output

    def _split(self, batch: FlatBatch) -> _Split:
        """Split a batch, once for all layers with this window."""
        if self._last is None or self._last[0] is not batch:
            self._last = batch, split(batch, self._window)
        return self._last[1]

    def _attend_masked(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        span: Span,
        scaling: float,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield positions in the batch, and attention (tokens, heads, dim) of tokens from there."""
        kv_heads = keys.shape[1]
        heads, _, dim = query.shape
        for first in range(0, span.length, self._piece):
            count = min(self._piece, span.length - first)
            position = span.history + first
            begin = max(0, position - self._window + 1)
            runs = cut(span.runs, begin, position + count)
            start = span.start + first
            grouped = query[:, start : start + count].view(kv_heads, -1, count, dim)
            attended = scaled_dot_product_attention(
                grouped,
                grouped_context(keys, runs, heads // kv_heads),
                grouped_context(values, runs, heads // kv_heads),
                attn_mask=self._mask_of(count, position - begin, query),
                scale=scaling,
            )
            yield start, attended.flatten(0, 1).transpose(0, 1)

    def _mask_of(self, tokens: int, history: int, like: torch.Tensor) -> torch.Tensor:
        """Return the mask (tokens, history + tokens) of a piece: a view of `_mask`.

        Which keys a token sees depends on how far they are before it, and on nothing else. Making
        a mask takes half as long as attending with it, so it is made once.
        """
        longest = self._window - 1
        if self._mask is None:
            self._mask = _make_mask(self._piece, longest, self._window, like)
        first = longest - history
        return self._mask[:tokens, first : first + history + tokens]


def _make_mask(tokens: int, history: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Return (tokens, history + tokens): 0 where a key is seen, minus infinity elsewhere.

    Every token sees itself, so no row is minus infinity only.
    """
    size = (tokens, history + tokens)
    unseen = torch.ones(size, dtype=torch.bool, device=like.device)
    unseen = unseen.triu(history + 1) | unseen.tril(history - window)
    return torch.zeros(size, dtype=like.dtype, device=like.device).masked_fill_(unseen, -torch.inf)


def split(batch: FlatBatch, window: int) -> _Split:
    """Return the sequences of a batch, by whether they need a mask."""
    whole: list[Span] = []
    masked: list[Span] = []
    rows: list[int] = []
    for span in batch.spans:
        if span.length > 1 and span.history + span.length > window:
            masked.append(span)
            continue
        history = min(span.history, window - span.length)
        seen = cut(span.runs, span.history - history, span.history + span.length)
        whole.append(Span(len(rows), span.length, history, seen, 1))
        rows += range(span.start, span.start + span.length)
    positions = torch.tensor(rows, device=batch.tokens.device) if masked else None
    return _Split(replace(batch, spans=tuple(whole), paged=None), positions, tuple(masked))


def cut(runs: Sequence[BlockRun], first: int, end: int) -> tuple[BlockRun, ...]:
    """Return the KV slots of positions ``first`` to ``end`` of a sequence, as runs of neighbours.

    Example: ``cut([(48, 80), (144, 147)], 30, 34)`` is ``((78, 80), (144, 146))``.
    """
    parts: list[BlockRun] = []
    position = 0
    for start, stop in runs:
        low, high = max(first - position, 0), min(end - position, stop - start)
        if low < high:
            parts.append((start + low, start + high))
        position += stop - start
    return tuple(parts)
