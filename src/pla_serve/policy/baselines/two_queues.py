"""Two queues, the short one first, and never both classes in a batch: the body of two policies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace

from pla_serve.policy.baselines.continuous import ContinuousBatching
from pla_serve.policy.baselines.fcfs import ArrivalQueue
from pla_serve.policy.book import RequestBook
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import BatchClass, Decision, Idle, Wait
from pla_serve.policy.queues import PrefillQueue, PrefillSource


class OneAtATime(ArrivalQueue):
    """First come, first served, one request in a batch."""

    def drain(self, now: float) -> Iterator[Pending]:
        for request in super().drain(now):
            yield request
            return


class TwoQueues(ContinuousBatching):
    """Shorts in rounds; a long one, alone in its batch, whenever no short waits.

    A round gathers shorts for a while. Meanwhile the device rests, longs or not; only decode steps
    run. So shorts that keep coming starve the longs: nothing bounds their wait.
    """

    def __init__(
        self,
        config: PolicyConfig,
        cost: CostModel,
        shorts: PrefillQueue,
        book: RequestBook,
        longs: OneAtATime,
    ) -> None:
        super().__init__(config, cost, shorts, book)
        self._shorts = shorts
        self._longs = longs
        self._none = ArrivalQueue()

    def next(self, now: float) -> Decision:
        batch_of = self._round(now)
        if isinstance(batch_of, Wait):
            if not self._book.decodes:
                return batch_of
            batch_of = self._none
        batch = self._assembler.batch(self._longs if batch_of is None else batch_of, now)
        if batch is None:
            return Idle()
        if batch.kind is BatchClass.MIXED:  # a long one with decode steps
            batch = replace(batch, kind=BatchClass.LONG)
        return self._start(batch, now)

    @abstractmethod
    def _round(self, now: float) -> PrefillSource | Wait | None:
        """Shorts to run now; or how long to gather; or None if there are no shorts."""

    @abstractmethod
    def _gathers(self, newcomer: Pending, now: float) -> float:
        """Seconds from ``now`` until the round of a newcomer ends, if nobody else comes."""

    def _seconds_ahead(self, newcomer: Pending, now: float) -> float:
        """All shorts, and for a long one everything; a chunk under way ends first."""
        total = self._book.seconds()
        if not newcomer.short:
            return total
        rest = self._rest(now)
        ahead = self._book.short_seconds()
        if self._running is not None and self._running[0].kind is BatchClass.LONG:
            ahead += rest
        return ahead + max(0.0, self._gathers(newcomer, now) - rest)
