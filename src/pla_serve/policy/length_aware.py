"""The project's policy: short prefills and decode steps run between the layers of long ones."""

from __future__ import annotations

from functools import partial
from math import inf

from pla_serve.policy.assemble import Assembler
from pla_serve.policy.book import RequestBook
from pla_serve.policy.chunking import long_chunk
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.declare import PolicyKind
from pla_serve.policy.echo import EchoWindow
from pla_serve.policy.express import ExpressWindow
from pla_serve.policy.fairness import ShareAccount, burst_seconds, passing_window
from pla_serve.policy.longs import LongQueue, RunningPrefills, Spread
from pla_serve.policy.pace import step_pace
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import (
    Batch,
    BatchClass,
    Capabilities,
    Chunk,
    Decision,
    Idle,
    PrefillRequest,
    QueueState,
    Run,
    TenantLoad,
    Wait,
)
from pla_serve.policy.queues import DueQueue
from pla_serve.policy.tenant_time import TenantTime
from pla_serve.policy.tokens import StreamCosts, TokenDeadlines
from pla_serve.policy.tuning import Tuning
from pla_serve.policy.waiting import ArrivalRate


class LengthAware:
    """Two queues by uncached tokens; the classes never share a batch.

    *Express work* is short prefills together with decode steps. It goes before long prefills, also
    at the layer boundaries of one that runs, where decode steps alone wait until a token is due
    (`tokens.TokenDeadlines`). Long prefills run in chunks (`chunking`), the one due first
    (`longs.LongQueue`), with decode steps in them where that is cheaper; one that has begun is left
    only for one that undercuts it clearly. Small longs may share a launch, and one that is due
    before the one that runs may run inside it, so that nothing is lost by being just too long.

    Every wait is bounded. While longs wait they get ``long_share`` of the time but for a burst
    (`fairness.ShareAccount`): `fairness.long_wait_bound`. Beyond that share they never hold up
    express work: `fairness.short_wait_bound`. A token waits until it is due, and some batches more:
    `fairness.token_wait_bound`. A long is passed by others only for `fairness.passing_window`. A
    more urgent priority goes first within its class, without bound.

    Without longs the batches are those of `fcfs`, one for one, as long as no deadline is set and
    the decode steps beside a short prefill take at most half of its time.
    Longs alone run without a gap; those of equal size in order of arrival.

    Every field of `PolicyConfig` is used.
    """

    def __init__(self, config: PolicyConfig, cost: CostModel, tuning: Tuning | None = None) -> None:
        self._tuning = tuning or Tuning()
        self.capabilities = Capabilities(leaves_at_layer_boundary=config.interruptible)
        self._config = config
        self._cost = cost
        self._shorts = DueQueue()
        self._longs = LongQueue(self._patience, self._window_of)
        self._book = RequestBook(config, cost, self._shorts, self._longs)
        self._tokens = TokenDeadlines(config, cost, self._book.decodes, self._tuning)
        self._assembler = Assembler(self._book, self._tokens.usual_target)
        self._tenants = TenantTime(self._book)
        self._account = ShareAccount(config.long_share, partial(burst_seconds, config, cost))
        self._flights = RunningPrefills()
        self._spread = Spread(self._tuning)
        self._offered = ArrivalRate(memory=self._tuning.load_memory)
        self._short_rate = ArrivalRate(memory=self._tuning.short_memory, least=2)
        self._echo = EchoWindow(cost)
        held = config.express_wait_seconds if config.interruptible else 0.0
        self._window = ExpressWindow(cost, held)
        self._current: str | None = None
        self._contested_since = 0.0
        self._newest = -inf
        """Arrival of the last request that came for the first time."""
        self._running_express: tuple[Batch, float] | None = None
        """The express batch under way, and when it began."""

    def add(self, request: PrefillRequest, now: float) -> None:
        contested = self._contested()
        pending = self._book.add(request)
        if request.arrival < self._newest:  # it was here before, with other numbers
            return
        self._newest = request.arrival
        self._offered.arrived(now, pending.seconds)
        if pending.short:
            self._window.arrived(now)
            self._short_rate.arrived(now)
            self._echo.arrived(now)
        if self._spread.add(pending.seconds, pending.short):
            self._longs.resort()
        if self._contested() and not contested:
            self._contested_since = now
            self._account.clear()

    def start_decode(
        self,
        request_id: str,
        context: int,
        arrival: float,
        now: float,
        tenant: str = "",
        tpot: float | None = None,
    ) -> None:
        self._book.start_decode(request_id, context, now, tenant, tpot)

    def remove(self, request_id: str) -> None:
        self._book.remove(request_id)
        self._flights.land(request_id)

    def next(self, now: float) -> Decision:
        if self._longs:
            pending = self._pick_long(now)
            turn = self._account.longs_turn
            if turn or not self._shorts_due(now):
                return Run(self._long_or_steps(pending, now))
        elif (until := self._echo_until(now)) is not None:
            return Wait(until)
        batch = self._express(now)
        return Run(batch) if batch is not None else Idle()

    def at_layer_boundary(self, now: float, running: Batch) -> Batch | None:
        if (
            running.kind is not BatchClass.LONG
            or not running.prefills
            or not self._config.interruptible
        ):
            return None
        account = self._account
        account.start_long(now)  # it stands still if express work was taken back as a whole
        self._settle(now)
        if not account.longs_turn and self._shorts_due(now):
            account.stop_long(now)
            return self._express(now)
        if self._steps_due_inside(now):
            account.stop_long(now)
            return self._steps(now)
        return self._nested(now) if self._longs else None

    def observe(self, batch: Batch, seconds: float, now: float) -> None:
        self.dispatched(batch, now)
        self.measured(batch, seconds, now)

    def dispatched(self, batch: Batch, now: float) -> None:
        self._book.settle(batch, now)
        self._echo.ended(now, sum(chunk.completes for chunk in batch.prefills))
        if batch.kind is BatchClass.LONG:
            self._settle(now)
            for chunk in (*batch.prefills, *batch.decodes):
                self._flights.land(chunk.request_id)
        else:
            self._running_express = None

    def measured(self, batch: Batch, seconds: float, now: float) -> None:
        self._cost.observe(batch, seconds)
        self._book.renew_prices()
        self._window.prepare()
        account = self._account
        if batch.kind is BatchClass.LONG:
            if not self._flights:
                account.stop_long(now)
        elif self._contested():
            account.charge_express(min(seconds, now - self._contested_since))
        if self._flights:
            account.start_long(now)

    def predicted_wait(
        self,
        new_tokens: int,
        history: int,
        now: float,
        deadline: float | None = None,
        *,
        bulk: bool = False,
    ) -> float:
        """Predict by the work that waits now; later arrivals that go first are not foreseen."""
        book, config = self._book, self._config
        newcomer = book.probe(new_tokens, history, now, deadline, bulk=bulk)
        shorts = self._shorts_ahead(newcomer, now)
        if newcomer.short:
            work = shorts + newcomer.seconds
            return work + (self._account.short_delay(work) if self._contested() else 0.0)
        work = self._long_seconds_ahead(newcomer) + newcomer.seconds
        if book.decodes.total:
            costs, target = self._promise(history)
            work /= max(1 - costs.least / target, config.long_share)
        share = config.long_share
        return work + min(shorts, work * (1 - share) / share + burst_seconds(config, self._cost))

    def token_seconds(self, context: int, tpot: float, now: float) -> float:
        """Beside longs, steps take at most what these leave, and wait for a layer."""
        usual = self._tokens.usual_target()
        pace = step_pace(self._book.decodes, self._config, self._cost, context, tpot, usual)
        if not self._contested():
            return pace
        top = self._flights.top
        layer = 0.0 if top is None else self._layer(top.seconds)
        return pace / (1 - self._config.long_share) + layer

    def state(self, now: float) -> QueueState:
        return self._book.state()

    def load_of(self, tenant: str) -> TenantLoad:
        return self._book.load_of(tenant)

    def waits_as_short(self, new_tokens: int, history: int) -> bool:
        return self._book.is_short(new_tokens, history)

    def _contested(self) -> bool:
        """Whether long prefills wait or run, so that shares of the time matter."""
        return bool(self._longs) or bool(self._flights)

    def _settle(self, now: float) -> None:
        """Count the long work done so far."""
        passed = self._account.settle(now)
        if self._flights.top is not None:
            self._flights.top.ran += passed

    def _shorts_due(self, now: float) -> bool:
        """Whether a short waits and is not held back for another one to share its launch."""
        first, others = self._shorts.first(), self._waiting_longs
        if first is None or (others and self._window.holds(first, len(self._shorts), others, now)):
            return False
        return self._echo_until(now) is None

    def _echo_until(self, now: float) -> float | None:
        """Return the time until which shorts wait for answers to the batch that has just ended.

        None: they go now. Decode steps do not wait, and nobody does where only one class is served.
        """
        if not self._shorts or self._book.decodes or not self._spread.mixed:
            return None
        until = self._echo.until(now, len(self._shorts))
        longest = self._config.express_wait_seconds
        return until if until is not None and until - now <= longest else None

    def _steps_due_inside(self, now: float) -> bool:
        """Whether decode steps go before the next layer of the running batch."""
        top = self._flights.top
        if not self._book.decodes or top is None:
            return False
        costs, target = self._promise(top.pending.history)
        layer = self._layer(top.seconds)
        return self._steps_due(costs, target, costs.step + layer, layer, now)

    def _steps_due(
        self, costs: StreamCosts, target: float, lead: float, layer: float, now: float
    ) -> bool:
        """Whether the first token is due within ``lead`` seconds."""
        turn = self._account.longs_turn
        least = self._tokens.least_target(costs, layer) if turn else 0.0
        return now + lead >= self._book.decodes.first_due(target, least)

    def _layer(self, seconds: float) -> float:
        """Return the seconds of one layer of a batch that takes ``seconds``; 0 if unknown."""
        return seconds / self._config.layers if self._config.layers else 0.0

    def _promise(self, history: int) -> tuple[StreamCosts, float]:
        """Return what streams cost beside a long, and their target."""
        costs = self._tokens.costs(history)
        return costs, self._tokens.target(costs)

    @property
    def _waiting_longs(self) -> int:
        """Longs that wait or run."""
        return len(self._longs) + len(self._flights)

    def _express(self, now: float) -> Batch | None:
        share = self._tuning.rider_share if self._contested() else self._tuning.idle_rider_share
        limit = self._tenants.limit(now)
        batch = self._assembler.batch(self._shorts, now, rider_share=share, limit=limit)
        if batch is not None:
            self._running_express = (batch, now)
        return batch

    def _steps(self, now: float) -> Batch:
        """Decode steps alone."""
        config, streams = self._config, self._book.decodes
        places = min(config.max_batch_requests, config.max_batch_tokens)
        limit = self._tenants.limit(now)
        if limit is not None:
            places = min(places, self._assembler.steps_within(limit.seconds))
        steps = streams.take(places, self._tokens.usual_target())
        batch = Batch(BatchClass.DECODE, decodes=tuple(steps))
        self._running_express = (batch, now)
        return batch

    def _long_or_steps(self, pending: Pending, now: float) -> Batch:
        """One chunk of a long, or decode steps that go before it, the device being free.

        If streams ride, the chunk carries the decode steps that are ready, and ends when the first
        of their tokens is due. They may be so late that it would have to be very short; then they
        get a step first, and ride in a long one. If they do not ride, the chunk carries none, and
        is left for steps of their own.
        """
        most, streams = self._chunk(pending, now), self._book.decodes
        if not streams:
            return self._long(pending, most, now)
        costs, target = self._promise(pending.history)
        rides = self._tokens.rides(costs, target, self._waiting_longs, self._short_rate.rate(now))
        if rides:
            layer = 0.0
            lead = costs.riders + target * costs.chunk / (costs.launch + costs.chunk)
        else:
            layer = self._layer(self._cost.prefill_seconds(most, pending.history))
            lead = costs.step + layer
        if self._steps_due(costs, target, lead, layer, now):
            return self._steps(now)
        if not rides:
            return self._long(pending, most, now)
        seconds = streams.first_due(target) - now
        most = min(most, self._tokens.chunk_tokens(costs, pending.history, seconds))
        batch = self._long(pending, most, now)
        config = self._config
        places = config.max_batch_requests - len(batch.prefills)
        riders = streams.take(min(places, config.max_batch_tokens - batch.tokens), target)
        if not riders:
            return batch
        self._flights.board(riders)
        return Batch(batch.kind, batch.prefills, tuple(riders))

    def _long(self, pending: Pending, most: int, now: float) -> Batch:
        """Return a chunk of at most ``most`` tokens, with the longs that share its launch."""
        batch = self._fly(pending, most, now)
        self._current = pending.id
        self._account.start_chunk(now)
        return batch

    def _chunk(self, pending: Pending, now: float) -> int:
        """Return the most tokens of a prefill that one batch may compute."""
        config, cap = self._config, self._book.cap
        if config.long_chunk_tokens is not None:
            return cap
        load = self._offered.rate(now)
        return int(min(cap, long_chunk(config, self._cost, self._tuning, pending.history, load)))

    def _pick_long(self, now: float) -> Pending:
        head = self._longs.head(now)
        assert head is not None
        current = self._book.get(self._current) if self._current is not None else None
        if (
            current is None
            or current.short
            or current.entry is None
            or current.priority != head.priority
        ):
            return head
        due = self._longs.due(current, less=self._tuning.switch_margin * current.seconds)
        return current if due <= self._longs.due(head) else head

    def _nested(self, now: float) -> Batch | None:
        """Return a long batch that is due earlier than the running one, to run inside it."""
        top = self._flights.top
        if top is None or len(self._flights) >= self._tuning.most_nested:
            return None
        head = self._longs.head(now)
        if head is None or head.priority > top.pending.priority:
            return None
        self._longs.give_up(top.pending, now, less=top.ran)
        due = self._longs.due(top.pending, less=top.ran + self._tuning.switch_margin * top.left)
        most = self._chunk(head, now)
        if self._longs.due(head) >= due or head.new_tokens > most:
            return None
        if top.riders:
            # Streams wait for the end of this batch: at most twice as long as they would without.
            if top.inside + head.seconds > top.seconds:
                return None
            top.inside += head.seconds
            most = head.new_tokens
        return self._fly(head, most, now, due)

    def _fly(self, pending: Pending, most: int, now: float, due: float = inf) -> Batch:
        """Return a batch of at most ``most`` tokens whose first prefill is ``pending``.

        Whole prefills that are due before ``due`` and might pass ``pending`` are added as long as
        that is predicted to pay: each delays those before it by its own tokens, and saves a launch
        for all that wait behind it.
        """
        chunks = [self._hand_out(pending, min(pending.new_tokens, most))]
        room, launch = most - chunks[0].tokens, self._cost.profile.per_launch
        latest = pending.arrival + self._window_of(pending.seconds)
        most_mates = min(self._tuning.most_mates, self._config.max_batch_requests)
        while room > 0 and len(chunks) < most_mates:
            head = self._longs.head(now)
            if (
                head is None
                or head.new_tokens > room
                or head.arrival > latest
                or head.priority != pending.priority
                or self._longs.due(head) >= due
                or len(chunks) * (head.seconds - launch) >= len(self._longs) * launch
            ):
                break
            chunks.append(self._hand_out(head, head.new_tokens))
            room -= head.new_tokens
        batch = Batch(BatchClass.LONG, tuple(chunks))
        self._flights.take_off(pending, batch, self._cost.seconds(batch))
        return batch

    def _hand_out(self, pending: Pending, tokens: int) -> Chunk:
        self._longs.discard(pending)
        return self._book.hand_out(pending, tokens)

    def _patience(self, seconds: float) -> float:
        """`fairness.passing_window`, or a small part of it; it changes only when queues are sorted
        again: with the cost model's epoch, and with the `Spread`."""
        window = self._window_of(seconds)
        return window if self._spread.heavy else window * self._tuning.light_patience

    def _window_of(self, seconds: float) -> float:
        config, most = self._config, self._config.max_batch_tokens
        return passing_window(config, seconds, self._cost.epoch_prefill_seconds(most, 0, most))

    def _shorts_ahead(self, newcomer: Pending, now: float) -> float:
        """Return the seconds of short work before a newcomer: all, if it is long or not due."""
        running, total = self._running_express, self._book.short_seconds()
        elapsed = 0.0 if running is None else now - running[1]
        left = max(0.0, total - elapsed)
        if newcomer.deadline is None or not newcomer.short:
            return left
        rest = 0.0 if running is None else max(0.0, self._cost.seconds(running[0]) - elapsed)
        return min(left, rest + self._shorts.seconds_ahead(newcomer, left))

    def _long_seconds_ahead(self, newcomer: Pending) -> float:
        """Return the seconds of long work, queued or running, that go before the newcomer."""
        total = self._book.long_seconds()
        ahead = self._longs.seconds_ahead(newcomer, total)
        for each in self._flights:
            goes_on = self._longs.due(each.pending, less=each.ran) <= self._longs.due(newcomer)
            ahead += max(each.rest, each.left if goes_on else 0.0)
        return min(ahead, total)


POLICY = PolicyKind(
    name="length-aware",
    summary="the project's own: shorts and decode steps run between the layers of longs",
    make=LengthAware,
)
