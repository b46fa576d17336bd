"""Fills one batch with decode steps and prefills. All policies share it."""

from __future__ import annotations

from pla_serve.policy.book import RequestBook, Taken
from pla_serve.policy.decodes import LOOSE_TARGET
from pla_serve.policy.protocol import Batch, BatchClass
from pla_serve.policy.queues import PrefillSource


class Assembler:
    """Continuous batching: decode steps first, then prefills in their queue's order.

    While prefills wait, decode steps keep at most half of the places, so that neither side can
    keep the other one out; places that the prefills leave free go back to decode. If a batch has a
    single place, the two take turns.
    """

    def __init__(self, book: RequestBook) -> None:
        self._book = book
        self._prefill_turn = True

    def batch(
        self,
        queue: PrefillSource,
        now: float,
        most_tokens: int | None = None,
        rider_share: float | None = None,
        tpot: float = LOOSE_TARGET,
    ) -> Batch | None:
        """Return the next batch, within ``max_batch_requests`` and ``max_batch_tokens``, or None.

        ``most_tokens`` is a further limit. With ``rider_share``, decode steps beside prefills take
        at most that share of the prefills' time, but for one step. ``tpot`` is the target of
        requests that decode without one of their own, in seconds.

        The batch is SHORT or LONG if its prefills are of that class (a SHORT one may carry decode
        steps as well), DECODE if it has none, and otherwise MIXED. None: there is nothing to run.
        """
        book, config = self._book, self._book.config
        decodes = book.decodes
        places, tokens = config.max_batch_requests, config.max_batch_tokens
        if most_tokens is not None:
            tokens = min(tokens, most_tokens)
        kept = min(len(decodes), self._decode_places(min(places, tokens))) if queue else 0
        taken = book.take(queue, places - kept, tokens - kept, now)
        prefills = taken.chunks
        free = min(places - len(prefills), tokens - taken.tokens)
        if prefills and rider_share is not None:
            free = min(free, self._riders(taken, rider_share))
        steps = decodes.take(free, tpot)
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

    def _riders(self, taken: Taken, share: float) -> int:
        """Return how many decode steps fit into this share of the prefills' time; at least one."""
        count, cost = len(self._book.decodes), self._book.cost
        if count < 2:
            return count
        each = (self._book.step_seconds() - cost.profile.per_launch) / count
        room = share * taken.seconds(cost)
        return count if each * count <= room else max(1, int(room / each))

    def _decode_places(self, places: int) -> int:
        if places > 1:
            return places // 2
        return 0 if self._prefill_turn else 1
