"""Chooses a captured shape for a batch, pads the batch to it, and replays it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pla_serve.engine.batch.flat import FlatBatch, Span, SpanRequest
from pla_serve.engine.batch.staging import (
    Capacity,
    Scratch,
    Uploader,
    capacity_of,
    pack,
    put_carried,
    unpack,
)
from pla_serve.engine.device.capture import Capturer, FixedPass
from pla_serve.engine.run.graphs.counts import GridCounts
from pla_serve.engine.run.runner import ModelRunner
from pla_serve.policy.shapes.ladder import Ladder, Layout, Shape, ShapeCost

log = logging.getLogger(__name__)

TABLE_TOO_LARGE = "table"
CAPTURE_FAILED = "capture_failed"
HOT = 32
"""Batches of one size that run on the ordinary kernels before a shape is captured for them."""
MOST_LAZY = 16
"""Most shapes that are captured while serving. Each takes memory that the KV plan left free."""
MOST_ENTRIES = 1 << 18
"""Most block-table entries of a captured batch (1 MiB)."""


@dataclass(frozen=True, slots=True)
class GridLimits:
    """Bounds of the batches that shapes are captured for."""

    block_tokens: int
    scratch: Scratch
    most_context: int
    """Most tokens of a sequence's context."""
    most_tokens: int
    """Most tokens of a shape that is captured while serving."""
    padding_cap: float
    """Largest share of padding in a batch. With more, a batch runs on the ordinary kernels."""


@dataclass(frozen=True, slots=True)
class _Captured:
    """Captured shape: what fits into it, and its replay."""

    capacity: Capacity
    play: FixedPass


class ShapeGrid:
    """Runs batches that fit a captured shape as one graph, attention and logits included.

    A shape is (tokens of the whole batch, requests). Real tokens come first, without padding
    between sequences, and the lengths of sequences are data. Padding belongs to no sequence: no
    token attends to it, and its KV goes to scratch slots. The published grid pads each request
    instead, and there padding has to come first, because its attention aligns the mask at the end.

    Example: a batch of 40 tokens of 3 requests runs on the shape 64x4 with 24 tokens of padding.

    Args:
        cost: predicted seconds of a shape. The cheapest shape that fits is taken.
        counts: counters that others add to as well. None makes new ones.
    """

    def __init__(
        self,
        runner: ModelRunner,
        capturer: Capturer,
        uploader: Uploader,
        shapes: Sequence[Shape],
        cost: ShapeCost,
        limits: GridLimits,
        device: torch.device,
        counts: GridCounts | None = None,
    ) -> None:
        self._runner = runner
        self._capturer = capturer
        self._uploader = uploader
        self._cost = cost
        self._limits = limits
        self._device = device
        self._wanted = sorted(set(shapes), key=lambda shape: (-shape.tokens, -shape.batch))
        self._captured: dict[Shape, _Captured] = {}
        self._failed: set[Shape] = set()
        self._missed: Counter[Shape] = Counter()
        self._hot: list[Shape] = []
        self._lazy = 0
        self._spans: tuple[Span, ...] = ()
        self._buffer = torch.zeros(0, dtype=torch.int32, device=device)
        self._logits: torch.Tensor | None = None
        self._ladder = self._make_ladder()
        self.counts = GridCounts() if counts is None else counts

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes that were captured."""
        return self._ladder.shapes

    def bytes_held(self) -> int:
        """Return the bytes of device memory that the captures keep."""
        return self._capturer.bytes_held()

    def capture_all(self, tell: Callable[[Shape, int, int], None] | None = None) -> None:
        """Capture the shapes that were asked for, largest first.

        Args:
            tell: called after each shape with the shape, its number from 1 on, and how many there
                are.
        """
        sizes = [self._capacity(Shape(self._limits.most_tokens, self._most_batch())).size]
        sizes += [self._capacity(shape).size for shape in self._wanted]
        self._buffer = torch.zeros(max(sizes), dtype=torch.int32, device=self._device)
        for number, shape in enumerate(self._wanted, 1):
            self._capture(shape)
            if tell is not None:
                tell(shape, number, len(self._wanted))
        self._ladder = self._make_ladder()

    def forward(
        self, requests: Sequence[SpanRequest], carried: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Run a batch on a captured shape, and return the logits (rows, vocabulary).

        They are valid until the next call. Returns None, and counts the reason, if no shape takes
        the batch. For ``carried`` see `Executor.forward`.
        """
        lengths = [len(request.tokens) for request in requests]
        fit = self._ladder.fit(lengths)
        if fit.shape is None:
            assert fit.reason is not None
            self._miss(str(fit.reason), sum(lengths), len(lengths))
            return None
        captured = self._captured[fit.shape]
        need = capacity_of(requests, self._limits.block_tokens)
        if need.entries > captured.capacity.entries:
            self.counts.fallbacks[TABLE_TOO_LARGE] += 1
            return None
        numbers, self._spans = pack(
            requests, captured.capacity, self._limits.block_tokens, self._limits.scratch
        )
        self._uploader.upload(numbers, self._buffer)
        if carried is not None:
            put_carried(self._buffer, captured.capacity, carried)
        logits = captured.play()
        self.counts.replays[f"{fit.shape.tokens}x{fit.shape.batch}"] += 1
        self.counts.real_tokens += need.tokens
        self.counts.padding_tokens += fit.shape.tokens - need.tokens
        return logits[: need.outputs]

    def capture_hot(self) -> bool:
        """Capture one shape that batches have often missed, in a quiet moment.

        Returns False if there is none.
        """
        if not self._hot or self._lazy >= MOST_LAZY:
            return False
        self._lazy += 1
        shape = self._hot.pop(0)
        self._capture(shape)
        self._ladder = self._make_ladder()
        log.info("captured a shape that was often missed: %d tokens, %d requests", *shape)
        return True

    def _miss(self, reason: str, tokens: int, count: int) -> None:
        """Count a batch that no shape takes, and note its shape once that is worth a capture."""
        self.counts.fallbacks[reason] += 1
        shape = Shape(-(-tokens // 16) * 16, 1 << (count - 1).bit_length())
        if shape.tokens > self._limits.most_tokens or shape.batch > self._most_batch():
            return
        self._missed[shape] += 1
        if self._missed[shape] == HOT and shape not in self._failed:
            self._hot.append(shape)

    def _most_batch(self) -> int:
        return max((shape.batch for shape in self._wanted), default=1)

    def _make_ladder(self) -> Ladder:
        return Ladder(
            self._captured, self._cost, padding_cap=self._limits.padding_cap, layout=Layout.FLAT
        )

    def _capacity(self, shape: Shape) -> Capacity:
        each = -(-self._limits.most_context // self._limits.block_tokens)
        entries = min(shape.batch * each, max(MOST_ENTRIES, each))
        return Capacity(shape.tokens, shape.batch, shape.batch, entries)

    def _capture(self, shape: Shape) -> None:
        """Capture a shape. If that fails, log the reason and go on without it."""
        capacity = self._capacity(shape)
        self._reset(capacity)
        try:
            self._captured[shape] = _Captured(
                capacity, self._capturer.capture(lambda: self._run(shape, capacity))
            )
        except RuntimeError as error:
            self._failed.add(shape)
            self.counts.fallbacks[CAPTURE_FAILED] += 1
            log.warning(
                "%d tokens, %d requests cannot be captured (%s: %s); such batches run on the "
                "ordinary kernels",
                *shape,
                type(error).__name__,
                str(error).splitlines()[0] if str(error) else "",
            )

    def _reset(self, capacity: Capacity) -> None:
        """Fill the buffer with an empty batch, for captures: it writes to scratch slots only."""
        numbers, self._spans = pack([], capacity, self._limits.block_tokens, self._limits.scratch)
        self._uploader.upload(numbers, self._buffer)

    @torch.inference_mode()
    def _run(self, shape: Shape, capacity: Capacity) -> torch.Tensor:
        """Run one fixed pass, and copy its logits to the one tensor that all shapes share."""
        logits = self._runner.forward(self._batch(shape, capacity))
        rows, width = logits.shape
        if self._logits is None:
            self._logits = torch.empty(
                self._most_batch(), width, dtype=logits.dtype, device=logits.device
            )
        return self._logits[:rows].copy_(logits)

    def _batch(self, shape: Shape, capacity: Capacity) -> FlatBatch:
        return unpack(
            self._buffer,
            capacity,
            self._spans,
            self._limits.block_tokens,
            most_query=shape.tokens,
            most_context=self._limits.most_context,
        )
