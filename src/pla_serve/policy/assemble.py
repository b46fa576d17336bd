"""Fills one batch with decode steps and prefills. All policies share it."""

from __future__ import annotations

from collections.abc import Callable

from pla_serve.policy.book import RequestBook, Taken
from pla_serve.policy.decodes import LOOSE_TARGET
from pla_serve.policy.protocol import Batch, BatchClass
from pla_serve.policy.queues import PrefillSource
from pla_serve.policy.tenant_time import BatchLimit


class Assembler:
    """Continuous batching: decode steps first, then prefills in their queue's order.

    While prefills wait, decode steps keep at most half of the places, so that neither side can
    keep the other one out; places that the prefills leave free go back to decode. If a batch has a
    single place, the two take turns.

    Args:
        usual_target: says what TPOT target, in seconds, requests have that decode without one of
            their own. It is asked only where a batch has too few places for all decode steps.
    """

    def __init__(
        self, book: RequestBook, usual_target: Callable[[], float] = lambda: LOOSE_TARGET
    ) -> None:
        self._book = book
        self._usual_target = usual_target
        self._prefill_turn = True

    def batch(
        self,
        queue: PrefillSource,
        now: float,
        most_tokens: int | None = None,
        rider_share: float | None = None,
        limit: BatchLimit | None = None,
    ) -> Batch | None:
        """Return the next batch, within ``max_batch_requests`` and ``max_batch_tokens``, or None.

        ``most_tokens`` is a further limit. With ``rider_share``, decode steps beside prefills take
        at most that share of the prefills' time, but for one step; ``limit`` replaces that.

        The batch is SHORT or LONG if its prefills are of that class (a SHORT one may carry decode
        steps as well), DECODE if it has none, and otherwise MIXED. None: there is nothing to run.
        """
        book, config = self._book, self._book.config
        decodes = book.decodes
        places, tokens = config.max_batch_requests, config.max_batch_tokens
        if most_tokens is not None:
            tokens = min(tokens, most_tokens)
        kept = min(len(decodes), self._decode_places(min(places, tokens))) if queue else 0
        if limit is None:
            taken = book.take(queue, places - kept, tokens - kept, now)
        else:
            most = min(tokens - kept, limit.tokens)
            taken = book.take(queue, places - kept, most, now, limit.each)
        prefills = taken.chunks
        free = min(places - len(prefills), tokens - taken.tokens)
        if limit is not None:
            free = min(free, max(limit.steps, self.steps_within(limit.seconds, taken)))
        elif prefills and rider_share is not None:
            free = min(free, self._fitting(rider_share * taken.seconds(book.cost)))
        if free < len(decodes):
            steps = decodes.take(free, self._usual_target())
        else:
            steps = decodes.take(free)
        if not prefills and not steps:
            return None
        self._prefill_turn = not prefills
        if not prefills:
            kind = BatchClass.DECODE
        elif taken.shorts == len(prefills):
            kind = BatchClass.SHORT
        else:
            kind = BatchClass.MIXED if taken.shorts or steps else BatchClass.LONG
        return Batch(kind, tuple(prefills), tuple(steps))

    def steps_within(self, seconds: float, taken: Taken | None = None) -> int:
        """Return how many decode steps end within ``seconds``, beside these prefills; at least one.

        It is 0 where no request is ready.
        """
        cost = self._book.cost
        beside = taken.seconds(cost) if taken is not None and taken.chunks else 0.0
        return self._fitting(seconds - max(beside, cost.profile.per_launch))

    def _fitting(self, seconds: float) -> int:
        """Return how many decode steps add at most ``seconds`` to a batch; at least one of any.

        Steps may cost nothing by the cost model, and ``seconds`` may be below 0.
        """
        count, context = len(self._book.decodes), self._book.decodes.mean_context
        each = self._book.cost.work_seconds(1, context, context + 1, 1, 0)
        room = max(0.0, seconds)
        return count if each * count <= room else max(1, int(room / each))

    def _decode_places(self, places: int) -> int:
        if places > 1:
            return places // 2
        return 0 if self._prefill_turn else 1
