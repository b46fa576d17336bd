"""The project's policy: short prefills and decode steps run between the layers of long ones."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from pla_serve.policy.assemble import Assembler
from pla_serve.policy.book import RequestBook
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.fairness import ShareAccount
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import (
    Batch,
    BatchClass,
    Decision,
    Idle,
    PrefillRequest,
    QueueState,
    Run,
)
from pla_serve.policy.queues import DueQueue, SortedQueue, aged_rank

SWITCH_MARGIN = 0.1
"""Share of its remaining time by which another long must undercut the one that has begun."""
NESTED_BOUNDARIES = 2
"""A long of at most this many boundaries may run inside another one."""
NESTED_GAIN = 2.0
"""How many times its own seconds the other one must have left."""


class LengthAware:
    """Two queues by uncached tokens; the classes never share a batch.

    *Express work* is short prefills together with decode steps. It goes before long prefills, also
    at the layer boundaries of one that runs, where decode steps alone are due only so often that
    they take ``decode_share`` of the time. Long prefills run one at a time in equal chunks of at
    most ``long_chunk_tokens``, with the decode steps that are ready as each begins, the shortest
    remaining first, aged (`queues.aged_rank`); one that
    has begun is left only for one that undercuts it clearly. A long little above the boundary may
    run inside a much longer one, so that nothing is lost by being just too long.

    Every wait is bounded. While longs wait they get ``long_share`` of the time but for a burst
    (`fairness.ShareAccount`): `fairness.long_wait_bound`. Beyond that share they never hold up
    express work: `fairness.short_wait_bound`. Decode steps wait for a turn in a full pool, for the
    gap between due steps, and for the longs' turn. Among longs the bound needs ``aging`` > 0. A
    more urgent priority goes first within its class, without bound.

    Without longs the batches are those of `fcfs`, one for one, as long as no deadline is set.
    Longs alone run without a gap; those of equal size in order of arrival.

    Every field of `PolicyConfig` is used. Deadlines order shorts only.
    """

    def __init__(self, config: PolicyConfig, cost: CostModel) -> None:
        self._config = config
        self._cost = cost
        self._shorts = DueQueue()
        self._longs = SortedQueue(aged_rank(config.aging))
        self._book = RequestBook(config, cost, self._shorts, self._longs)
        self._assembler = Assembler(self._book)
        self._account = ShareAccount(config)
        self._flying_longs: set[str] = set()
        self._current: str | None = None
        self._contested_since = 0.0
        self._decoded_at = -inf
        self._express_started: float | None = None

    def add(self, request: PrefillRequest, now: float) -> None:
        contested = self._contested()
        self._book.add(request)
        if self._contested() and not contested:
            self._contested_since = now
            self._account.clear()

    def start_decode(self, request_id: str, context: int, arrival: float, now: float) -> None:
        self._book.start_decode(request_id, context)

    def remove(self, request_id: str) -> None:
        self._book.remove(request_id)
        self._flying_longs.discard(request_id)

    def next(self, now: float) -> Decision:
        if self._longs and (self._account.longs_turn or not self._express_due(now)):
            return Run(self._long(now))
        batch = self._express(now)
        return Run(batch) if batch is not None else Idle()

    def at_layer_boundary(self, now: float, running: Batch) -> Batch | None:
        if running.kind is not BatchClass.LONG or not running.prefills:
            return None
        account = self._account
        account.start_long(now)  # it stands still if express work was taken back as a whole
        account.settle(now)
        if not account.longs_turn and self._express_due(now):
            account.stop_long(now)
            return self._express(now)
        return self._nested(now, running) if self._longs else None

    def observe(self, batch: Batch, seconds: float, now: float) -> None:
        self._cost.observe(batch, seconds)
        self._book.settle(batch)
        self._book.renew_prices()
        account = self._account
        if batch.decodes:
            self._decoded_at = now
        if batch.kind is BatchClass.LONG:
            account.stop_long(now)
            self._flying_longs.difference_update([chunk.request_id for chunk in batch.prefills])
        else:
            self._express_started = None
            if self._contested():
                account.charge_express(min(seconds, now - self._contested_since))
        if self._flying_longs:
            account.start_long(now)

    def predicted_wait(self, new_tokens: int, history: int, now: float) -> float:
        """As the work stands now; what arrives later and goes first is not foreseen."""
        book, config = self._book, self._config
        newcomer = book.probe(new_tokens, history, now)
        elapsed = 0.0 if self._express_started is None else now - self._express_started
        shorts = max(0.0, book.short_seconds() - elapsed)
        if newcomer.short:
            work = shorts + newcomer.seconds
            return work + (self._account.short_delay(work) if self._contested() else 0.0)
        work = self._long_seconds_ahead(newcomer) + newcomer.seconds
        if book.decodes.total:
            work /= 1 - config.decode_share
        share = config.long_share
        return work + min(shorts, work * (1 - share) / share + config.express_burst_seconds)

    def state(self, now: float) -> QueueState:
        return self._book.state()

    def waits_as_short(self, new_tokens: int, history: int) -> bool:
        return self._book.is_short(new_tokens, history)

    def _contested(self) -> bool:
        """Longs wait or run, so that shares matter."""
        return bool(self._longs) or bool(self._flying_longs)

    def _express_due(self, now: float) -> bool:
        if self._shorts:
            return True
        if not self._book.decodes:
            return False
        if not self._contested():
            return True
        share = self._config.decode_share
        gap = self._book.step_seconds() * (1 - share) / share
        return now >= self._decoded_at + gap

    def _express(self, now: float) -> Batch | None:
        batch = self._assembler.batch(self._shorts, now)
        if batch is not None:
            self._express_started = now
        return batch

    def _long(self, now: float) -> Batch:
        """One chunk of the long that is to go on; a chunk is an equal part of what is left.

        Decode steps ride along: a token more in a large batch costs a fraction of a step alone,
        which has to read all weights for it.
        """
        pending = self._pick_long()
        tokens, cap = pending.new_tokens, self._book.cap
        batch = self._fly(pending, -(-tokens // -(-tokens // cap)))
        self._current = pending.id
        self._account.start_chunk(now)
        places, room = self._config.max_batch_requests - 1, self._config.max_batch_tokens
        riders = self._book.decodes.take(min(places, room - batch.tokens))
        return replace(batch, decodes=tuple(riders)) if riders else batch

    def _pick_long(self) -> Pending:
        head = self._longs.first()
        assert head is not None
        current = self._book.get(self._current) if self._current is not None else None
        if (
            current is None
            or current.short
            or current.entry is None
            or current.priority != head.priority
        ):
            return head
        allowance = SWITCH_MARGIN * current.seconds
        return current if self._aged(current) <= self._aged(head) + allowance else head

    def _nested(self, now: float, running: Batch) -> Batch | None:
        """A small long to run inside a much longer one."""
        head = self._longs.first()
        outer = self._book.get(running.prefills[0].request_id)
        if head is None or outer is None or head.whole is None or head.priority > outer.priority:
            return None
        if head.new_tokens > NESTED_BOUNDARIES * self._book.boundary(head.history):
            return None
        left = outer.seconds - self._account.ran
        passes = self._aged(head) < left + self._config.aging * outer.arrival
        if not passes or left < NESTED_GAIN * head.seconds:
            return None
        return self._fly(head, head.new_tokens)

    def _fly(self, pending: Pending, tokens: int) -> Batch:
        self._longs.discard(pending)
        chunk = self._book.hand_out(pending, tokens)
        self._flying_longs.add(pending.id)
        return Batch(BatchClass.LONG, (chunk,))

    def _aged(self, pending: Pending) -> float:
        return pending.seconds + self._config.aging * pending.arrival

    def _long_seconds_ahead(self, newcomer: Pending) -> float:
        """Queued longs that go before the newcomer, and what it must await of those in flight."""
        total = self._book.long_seconds()
        ahead = self._longs.seconds_ahead(newcomer, total)
        for request_id in self._flying_longs:
            pending = self._book.get(request_id)
            if pending is None or pending.flight is None:
                continue
            rest = pending.seconds
            if self._aged(pending) > self._aged(newcomer):
                rest = self._cost.prefill_seconds(pending.flight.tokens, pending.flight.history)
            ahead += max(0.0, rest - self._account.ran)
        return min(ahead, total)
