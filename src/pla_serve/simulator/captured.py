"""The time of a batch on a machine that captures shapes, and of one that has to launch kernels."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import Batch, Chunk
from pla_serve.policy.shapes.ladder import (
    GRID_BATCHES,
    GRID_TOKENS,
    Ladder,
    Layout,
    Shape,
    grid,
    size_of,
    slots,
)


class Captured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which prefill batches are replayed as a whole, and what the others pay.

    The host launches the ordinary kernels of a pass while the device computes, so such a pass takes
    as long as the slower of the two. A replayed one takes what the device needs for all slots of
    its shape, padding included.
    """

    ordinary_seconds: float
    """Host time to launch the ordinary kernels of one pass."""
    tokens: tuple[int, ...] = GRID_TOKENS
    """With ``batches`` all pairs of a grid (`ladder.Shape`); empty captures nothing."""
    batches: tuple[int, ...] = GRID_BATCHES
    layout: Layout = Layout.PADDED
    always: bool = True
    """A batch is padded to its nearest shape also where ordinary kernels would be faster, as
    published; if not, the faster of the two runs."""

    def __post_init__(self) -> None:
        if not self.ordinary_seconds >= 0:
            raise ValueError(f"ordinary_seconds must be at least 0, not {self.ordinary_seconds}")
        if min(*self.tokens, *self.batches, 1) < 1:
            raise ValueError("captured tokens and batches must be at least 1")


class CapturedCost(CostModel):
    """The true seconds of a batch; learns nothing.

    ``profile`` is the device's own time. A batch with prefills runs captured if it has no decode
    step and some shape covers it. Steps of decode alone are taken to be captured everywhere, as
    every engine does it.
    """

    def __init__(self, profile: CostProfile, captured: Captured) -> None:
        super().__init__(profile)
        self._captured = captured
        shapes = grid(captured.tokens, captured.batches)
        self._ladder = Ladder(shapes, self._shape_seconds, layout=captured.layout)
        self._most_tokens = max(captured.tokens, default=0)

    def seconds(self, batch: Batch) -> float:
        """Of one batch, where it runs."""
        device = super().seconds(batch)
        if not batch.prefills:
            return device
        ordinary = max(device, self._captured.ordinary_seconds)
        replayed = None if batch.decodes else self._replayed(batch.prefills, device)
        if replayed is None:
            return ordinary
        return replayed if self._captured.always else min(replayed, ordinary)

    def observe(self, batch: Batch, seconds: float) -> None:
        """Nothing to learn."""

    def _replayed(self, chunks: Sequence[Chunk], device: float) -> float | None:
        """Seconds in the nearest shape; None if there is none."""
        if chunks[0].tokens > self._most_tokens:
            return None
        layout = self._captured.layout
        shape = self._ladder.nearest(size_of([chunk.tokens for chunk in chunks], layout))
        if shape is None:
            return None
        if layout is Layout.FLAT:
            padding = shape.tokens - sum(chunk.tokens for chunk in chunks)
            return device + self.work_seconds(padding, 0, padding, shape.batch - len(chunks), 0)
        history = sum(chunk.history for chunk in chunks)
        return self._shape_seconds(*shape) + self.work_seconds(
            0, shape.tokens * history, history, 0, 0
        )

    def _shape_seconds(self, tokens: int, batch: int) -> float:
        """Without history; for a flat shape a price to compare by."""
        count = slots(Shape(tokens, batch), self._captured.layout)
        return self.work_seconds(count, count * count / batch / 2, count, batch, 1)
