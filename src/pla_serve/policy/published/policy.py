"""``--policy pla-serve``: the published system on one instance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from pla_serve.policy.baselines.two_queues import OneAtATime, TwoQueues
from pla_serve.policy.book import RequestBook
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.declare import PolicyKind
from pla_serve.policy.knobs import Knob
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import Batch, BatchClass, PrefillRequest, Wait
from pla_serve.policy.published.awd import AdaptiveWaitDepth, AwdOptions, Dispatch, WaitUntil
from pla_serve.policy.published.boundary import FittedBoundary
from pla_serve.policy.published.levels import LengthLevels
from pla_serve.policy.queues import PrefillSource
from pla_serve.policy.shapes.ladder import GRID_TOKENS, Ladder, Layout, Shape, grid, slots


@dataclass(frozen=True, slots=True)
class PlaServeOptions(AwdOptions):
    """Knobs of `PlaServe`: those of AWD, the long queue's and the boundary's.

    Raises:
        ValueError: a field is out of range.
    """

    chunk_tokens: Annotated[
        int,
        Knob(
            "C_l: most tokens of a long prompt's chunk, and of any other batch.",
            unit="tokens",
            least=1,
        ),
    ] = 8192
    padded: Annotated[
        bool,
        Knob(
            "Whether the machine captures the published shapes. If so, the service time S of a "
            "batch counts the padding up to its nearest shape."
        ),
    ] = True
    least_boundary: Annotated[
        int, Knob("Smallest L_m that the latency model may give.", unit="tokens", least=0)
    ] = 150
    most_boundary: Annotated[
        int, Knob("Largest L_m that the latency model may give.", unit="tokens", least=0)
    ] = 512


class PublishedBook(RequestBook):
    """Request book that counts a prefill as short if L <= L_m(H), the published boundary.

    A boundary that the settings fix takes the place of L_m(H).
    """

    def __init__(
        self,
        config: PolicyConfig,
        cost: CostModel,
        queues: tuple[LengthLevels, OneAtATime],
        fitted: FittedBoundary,
    ) -> None:
        super().__init__(config, cost, *queues, one_account=True)
        self._fitted = fitted

    def boundary(self, history: int) -> int:
        """L_m, tokens."""
        given = self.config.boundary_tokens
        return self._fitted.tokens(history) if given is None else given


class Round:
    """Members of one AWD round; a batch is filled from them in their order."""

    def __init__(self, members: tuple[Pending, ...], levels: LengthLevels) -> None:
        self._members = members
        self._levels = levels

    def __len__(self) -> int:
        return len(self._members)

    def drain(self, now: float) -> Iterator[Pending]:
        """Take members out of the short queue; those that find no room in the batch stay there."""
        for member in self._members:
            self._levels.discard(member)
            yield member


class PlaServe(TwoQueues):
    """The system of arXiv 2601.11589 on one instance, step by step.

    - *Classification.* A request goes to the short queue Q_s if its new tokens L are at most
      L_m(H), else to the long queue Q_l. L_m comes from the published latency model, fitted while
      serving (`FittedBoundary`), or is ``boundary_tokens``.
    - *Mutual exclusion.* A batch holds prefills of one class.
    - *Temporal disaggregation.* The instance alternates between the classes: Q_s in rounds, Q_l
      whenever Q_s is empty. While a round gathers, the device rests.
    - *Captured shapes.* Rounds are grouped by the published grid, L in {8, ..., 256} times B in
      {1, ..., 64}; predicted times count the padding (knob ``padded``). Padding itself is done by a
      machine that captures these shapes: ``--capture-shapes paper``.
    - *AWD* for Q_s, in deadline mode or token-max mode: `awd`.
    - *Long queue.* One request at a time, first come, first served, in chunks of ``chunk_tokens``
      (C_l) that nothing interrupts.
    - *Decode.* Mode mix: decode steps join every batch, and run alone while a round gathers. Wrap
      it in `temporal.PrefillFirst` for PD temporal, or decode on other instances for PD spatial.

    Bounded waits: a round never holds its head for longer than ``head_wait`` (T_max), never holds
    any pending request beyond its deadline's slack, and never lasts longer than W_max. A short
    request that meets fewer than D others of its length therefore starts within T_max, plus the
    batch that is under way. Not bounded, as published: shorts that keep coming starve the longs;
    a short waits for a whole running chunk; and shorts beyond the machine's capacity wait for each
    other.

    Example: ``pla-serve simulate --trace gen:chat --policy pla-serve,length-aware``. On the command
    line ``pla-serve:mode=token_max:boundary-tokens=256`` is the offline setting.

    Uses of `PolicyConfig`: ``max_batch_requests`` and ``boundary_tokens``. ``chunk_tokens`` takes
    the place of ``max_batch_tokens`` and ``long_chunk_tokens``.
    """

    def __init__(
        self, config: PolicyConfig, cost: CostModel, options: PlaServeOptions | None = None
    ) -> None:
        options = options or PlaServeOptions()
        config = replace(config, max_batch_tokens=options.chunk_tokens, long_chunk_tokens=None)
        self._boundary = FittedBoundary(cost.profile, options.least_boundary, options.most_boundary)
        self._levels, longs = LengthLevels(GRID_TOKENS), OneAtATime()
        book = PublishedBook(config, cost, (self._levels, longs), self._boundary)
        super().__init__(config, cost, self._levels, book, longs)
        self._padded = options.padded
        self._shapes = [shape for shape in grid() if shape.batch <= config.max_batch_requests]
        self._awd = AdaptiveWaitDepth(options, self._ladder())
        self._epoch = cost.epoch

    @property
    def awd(self) -> AdaptiveWaitDepth:
        """State of AWD, with W and D, for tests and experiments."""
        return self._awd

    def add(self, request: PrefillRequest, now: float) -> None:
        known = self._book.get(request.id) is not None
        pending = self._book.add(request)
        if pending.short and not known:
            self._awd.arrived(now)

    def measured(self, batch: Batch, seconds: float, now: float) -> None:
        super().measured(batch, seconds, now)
        self._boundary.observe(batch, seconds)
        if batch.kind is BatchClass.SHORT and batch.prefills:
            self._awd.observe(len(batch.prefills), seconds)
        if self._epoch != self._cost.epoch:
            self._epoch = self._cost.epoch
            self._awd.reprice(self._ladder())

    def _round(self, now: float) -> PrefillSource | Wait | None:
        decision = self._awd.decide(self._levels, now)
        if isinstance(decision, Dispatch):
            return Round(decision.members, self._levels)
        if isinstance(decision, WaitUntil):
            return Wait(decision.time)
        return None

    def _gathers(self, newcomer: Pending, now: float) -> float:
        return self._awd.window_left(now)

    def _ladder(self) -> Ladder:
        """The published grid at the seconds that the cost model predicts now."""
        cost = self._cost

        def shape_seconds(tokens: int, batch: int) -> float:
            count = slots(Shape(tokens, batch), Layout.PADDED)
            return cost.work_seconds(count, count * tokens / 2, count, batch, 1)

        def ordinary_seconds(tokens: float, batch: int) -> float:
            return cost.work_seconds(tokens, tokens * tokens / batch / 2, tokens, batch, 1)

        return Ladder(self._shapes, shape_seconds, eager=None if self._padded else ordinary_seconds)


POLICY = PolicyKind(
    name="pla-serve",
    summary="the published system: AWD rounds of shorts first, longs one at a time in chunks",
    make=PlaServe,
    options=PlaServeOptions,
    settings=("max_batch_requests", "boundary_tokens"),
)
