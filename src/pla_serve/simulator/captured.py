"""Time of a batch on a machine that runs captured shapes, and otherwise launches kernels."""

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
    """Shapes whose prefill batches run captured, and the launch time of all other batches.

    The host launches the ordinary kernels of a pass while the device computes, so such a pass takes
    as long as the slower of the two. A captured pass takes the time that the device needs for all
    slots of its shape, padding included.
    """

    ordinary_seconds: float
    """Host time to launch the ordinary kernels of one pass."""
    tokens: tuple[int, ...] = GRID_TOKENS
    """Tokens of the captured shapes, which are all pairs with ``batches`` (`ladder.Shape`); empty
    captures nothing."""
    batches: tuple[int, ...] = GRID_BATCHES
    layout: Layout = Layout.PADDED
    always: bool = True
    """Whether a batch is padded to its nearest shape even where ordinary kernels would be faster,
    as published. If not, the faster of the two runs."""

    def __post_init__(self) -> None:
        if not self.ordinary_seconds >= 0:
            raise ValueError(f"ordinary_seconds must be at least 0, not {self.ordinary_seconds}")
        if min(*self.tokens, *self.batches, 1) < 1:
            raise ValueError("captured tokens and batches must be at least 1")


class CapturedCost(CostModel):
    """True seconds of a batch. Unlike other cost models it does not learn.

    A batch with prefills runs captured if it has no decode step and some shape covers it. Batches
    of decode steps alone always run captured, as in every engine.

    Args:
        profile: time on the device, without launches by the host.
    """

    def __init__(self, profile: CostProfile, captured: Captured) -> None:
        super().__init__(profile)
        self._captured = captured
        shapes = grid(captured.tokens, captured.batches)
        self._ladder = Ladder(shapes, self._shape_seconds, layout=captured.layout)
        self._most_tokens = max(captured.tokens, default=0)

    def seconds(self, batch: Batch) -> float:
        """Return the seconds of one batch, captured or not."""
        device = super().seconds(batch)
        if not batch.prefills:
            return device
        ordinary = max(device, self._captured.ordinary_seconds)
        replayed = None if batch.decodes else self._replayed(batch.prefills, device)
        if replayed is None:
            return ordinary
        return replayed if self._captured.always else min(replayed, ordinary)

    def observe(self, batch: Batch, seconds: float) -> None:
        """Ignore the measurement."""

    def _replayed(self, chunks: Sequence[Chunk], device: float) -> float | None:
        """Return the seconds in the nearest shape; None if no shape covers the prefills."""
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
        """Return the seconds of a shape without history; of a flat one, for comparisons only."""
        count = slots(Shape(tokens, batch), self._captured.layout)
        return self.work_seconds(count, count * count / batch / 2, count, batch, 1)
