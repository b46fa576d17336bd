"""Captured shapes, and the one that a batch goes into.

A captured shape (a CUDA graph) computes a fixed number of token slots; a batch that fits is padded
to it. The published grid (PLA-Serve, arXiv 2601.11589) is padded per request; an engine whose
batches are ragged and flat captures total tokens instead. Both are a `Layout` here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

ShapeCost = Callable[[int, int], float]
"""Seconds for (tokens, batch), as in `Shape`."""
EagerCost = Callable[[float, int], float]
"""Seconds of the ordinary kernels for (tokens of the whole batch, requests); they pad nothing."""

GRID_TOKENS = (8, 16, 32, 64, 128, 256)
GRID_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Layout(StrEnum):
    """Meaning of ``tokens`` in a shape."""

    PADDED = "padded"
    """Slots of each request: every one is padded to the longest."""
    FLAT = "flat"
    """Slots of the whole batch: requests lie end to end."""


class Shape(NamedTuple):
    """Size of a captured graph: ``batch`` requests, and ``tokens`` as its layout counts them.

    Example: with layout PADDED, ``Shape(32, 4)`` takes four prompts of up to 32 new tokens each.
    """

    tokens: int
    batch: int

    def covers(self, other: Shape) -> bool:
        """Whether a batch of the size ``other`` fits."""
        return self.tokens >= other.tokens and self.batch >= other.batch


def slots(shape: Shape, layout: Layout) -> int:
    """Tokens that the shape computes, real or padding."""
    return shape.tokens * shape.batch if layout is Layout.PADDED else shape.tokens


def size_of(lengths: Sequence[int], layout: Layout) -> Shape:
    """The smallest shape that a batch with these new-token lengths fits into.

    Raises:
        ValueError: there are no lengths, or one is below 1.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a batch needs lengths of at least 1, not {list(lengths)}")
    return Shape(max(lengths) if layout is Layout.PADDED else sum(lengths), len(lengths))


class Fallback(StrEnum):
    """Why a batch runs on the ordinary kernels."""

    NO_SHAPES = "no_shapes"
    TOO_LONG = "too_long"
    """More tokens than any shape."""
    TOO_MANY = "too_many"
    """More requests than any shape."""
    NOT_COVERED = "not_covered"
    """Some shapes take the tokens and others the requests, but none takes both."""
    PADDING = "padding"
    """The nearest shape would be padding beyond the cap."""
    CHEAPER = "cheaper"
    """The ordinary kernels are predicted to be no slower than the nearest shape."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Where a batch runs; exactly one of ``shape`` and ``reason`` is None."""

    shape: Shape | None
    reason: Fallback | None
    seconds: float
    """Predicted; 0 for ordinary kernels whose cost the ladder was not told."""
    waste: float = 0.0
    """Share of the slots that is padding, 0 to 1; 0 on ordinary kernels."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory and time that capturing a shape takes: a fixed part, and a part for each slot.

    Published for 7B, 14B and 32B models: 228, 240 and 277 MB and 8 to 12 s a graph, whatever its
    size (arXiv 2601.11589).
    """

    bytes_per_shape: float
    seconds_per_shape: float
    bytes_per_slot: float = 0.0
    seconds_per_slot: float = 0.0

    def bytes_of(self, shape: Shape, layout: Layout) -> float:
        """Device memory that the captured shape keeps."""
        return self.bytes_per_shape + self.bytes_per_slot * slots(shape, layout)

    def seconds_of(self, shape: Shape, layout: Layout) -> float:
        """Time to capture it."""
        return self.seconds_per_shape + self.seconds_per_slot * slots(shape, layout)


class Ladder:
    """A set of captured shapes with what each one costs.

    Args:
        shapes: duplicates count once.
        cost: seconds of each shape; asked once a shape, here.
        eager: seconds of the ordinary kernels. With it, a batch runs there if that is no slower
            than its nearest shape.
        padding_cap: largest share of padding in a shape, 0 to 1; a batch that would exceed it runs
            on the ordinary kernels.
        layout: what the shapes' tokens count.

    Raises:
        ValueError: a shape is smaller than one token or request, or ``padding_cap`` is not in 0..1.
    """

    def __init__(
        self,
        shapes: Iterable[Shape],
        cost: ShapeCost,
        *,
        eager: EagerCost | None = None,
        padding_cap: float = 1.0,
        layout: Layout = Layout.PADDED,
    ) -> None:
        if not 0 <= padding_cap <= 1:
            raise ValueError(f"padding_cap must lie in 0..1, not {padding_cap}")
        self._layout = layout
        self._eager = eager
        self._cap = padding_cap
        unique = sorted(set(shapes))
        for shape in unique:
            if shape.tokens < 1 or shape.batch < 1:
                raise ValueError(f"a shape has at least one token and one request, not {shape}")
        priced = [(cost(*shape), slots(shape, layout), shape) for shape in unique]
        self._by_cost = tuple((seconds, shape) for seconds, _, shape in sorted(priced))
        self.shapes = tuple(unique)

    @property
    def layout(self) -> Layout:
        """Meaning of ``tokens`` in these shapes."""
        return self._layout

    def nearest(self, size: Shape) -> Shape | None:
        """The cheapest shape that covers ``size``, fewest slots among equals; caps are ignored."""
        return next((shape for _, shape in self._by_cost if shape.covers(size)), None)

    def fit(self, lengths: Sequence[int]) -> Fit:
        """Return where a batch with these numbers of new tokens runs.

        Raises:
            ValueError: there are no lengths, or one is below 1.
        """
        return self.fit_size(size_of(lengths, self._layout), sum(lengths))

    def fit_size(self, size: Shape, tokens: float) -> Fit:
        """Return where a batch of this size, with so many real tokens in all, runs."""
        eager = self._eager(tokens, size.batch) if self._eager is not None else None
        found = next(((cost, shape) for cost, shape in self._by_cost if shape.covers(size)), None)
        if found is None:
            return Fit(None, self._why_none(size), eager or 0.0)
        seconds, shape = found
        waste = 1 - tokens / slots(shape, self._layout)
        if waste > self._cap:
            return Fit(None, Fallback.PADDING, eager or 0.0)
        if eager is not None and eager <= seconds:
            return Fit(None, Fallback.CHEAPER, eager)
        return Fit(shape, None, seconds, waste)

    def level(self, tokens: int) -> int | None:
        """The fewest tokens of a shape that takes a request of so many; None if there is none."""
        fitting = [shape.tokens for shape in self.shapes if shape.tokens >= tokens]
        return min(fitting, default=None)

    def capacity(self, tokens: int = 1) -> int:
        """Most requests of a shape with at least so many tokens; 0 if there is none."""
        return max((s.batch for s in self.shapes if s.tokens >= tokens), default=0)

    def within(self, most_slots: float) -> Ladder:
        """The shapes with at most so many slots, at the prices of today."""
        prices = {shape: seconds for seconds, shape in self._by_cost}
        kept = [shape for shape in self.shapes if slots(shape, self._layout) <= most_slots]
        return Ladder(
            kept,
            lambda tokens, batch: prices[Shape(tokens, batch)],
            eager=self._eager,
            padding_cap=self._cap,
            layout=self._layout,
        )

    def memory_bytes(self, footprint: Footprint) -> float:
        """Device memory of all shapes."""
        return sum(footprint.bytes_of(shape, self._layout) for shape in self.shapes)

    def capture_seconds(self, footprint: Footprint) -> float:
        """Time to capture all shapes."""
        return sum(footprint.seconds_of(shape, self._layout) for shape in self.shapes)

    def _why_none(self, size: Shape) -> Fallback:
        if not self.shapes:
            return Fallback.NO_SHAPES
        if all(shape.tokens < size.tokens for shape in self.shapes):
            return Fallback.TOO_LONG
        if all(shape.batch < size.batch for shape in self.shapes):
            return Fallback.TOO_MANY
        return Fallback.NOT_COVERED


def grid(
    tokens: Iterable[int] = GRID_TOKENS, batches: Iterable[int] = GRID_BATCHES
) -> tuple[Shape, ...]:
    """All pairs; by default the published power-of-two grid (arXiv 2601.11589)."""
    levels = tuple(batches)
    return tuple(Shape(length, batch) for length in tokens for batch in levels)
