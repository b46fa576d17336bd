"""The published system (arXiv 2601.11589) put together: AWD for shorts, one long at a time.

The parts are the project's; this only joins them, so that the figures can be compared. The longs,
and everything else, are those of the published artifact (`policy/baselines/laps.py`).
"""

from __future__ import annotations

from pla_serve.policy.awd import AdaptiveWaitDepth, AwdOptions, WaitUntil
from pla_serve.policy.baselines.laps import Laps, LapsOptions
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, BatchClass, Decision, PrefillRequest, Run, Wait
from pla_serve.policy.shapes.ladder import Ladder, Layout, Shape, grid, slots


class Published(Laps):
    """Shorts in rounds of AWD, padded to the published grid; each class alone, shorts first."""

    def __init__(
        self, config: PolicyConfig, cost: CostModel, options: AwdOptions | None = None
    ) -> None:
        super().__init__(config, cost, LapsOptions(window_seconds=0.0, classify="uncached"))

        def shape_seconds(tokens: int, batch: int) -> float:
            count = slots(Shape(tokens, batch), Layout.PADDED)
            return cost.work_seconds(count, count * tokens / 2, count, batch, 1)

        ladder = Ladder(grid(), shape_seconds)
        self._awd = AdaptiveWaitDepth(options or AwdOptions(), ladder)

    @property
    def awd(self) -> AdaptiveWaitDepth:
        """W and D, to look at."""
        return self._awd

    def add(self, request: PrefillRequest, now: float) -> None:
        super().add(request, now)
        if self.waits_as_short(request.new_tokens, request.history):
            self._awd.arrived(now)

    def next(self, now: float) -> Decision:
        decision = self._awd.decide(self._shorts.requests()[::-1], now)
        if decision is None:
            return super().next(now)
        if isinstance(decision, WaitUntil):
            steps = self._assembler.batch(self._none, now)
            return Wait(decision.time) if steps is None else Run(steps)
        chunks = []
        for name in decision.ids:
            pending = self._book.get(name)
            assert pending is not None
            self._shorts.discard(pending)
            chunks.append(self._book.hand_out(pending, pending.new_tokens))
        return self._start(Batch(BatchClass.SHORT, tuple(chunks)), now)

    def observe(self, batch: Batch, seconds: float, now: float) -> None:
        super().observe(batch, seconds, now)
        if batch.kind is BatchClass.SHORT and batch.prefills:
            self._awd.observe(len(batch.prefills), seconds)
