"""Continuous batching in any order of prefills: the body of the baselines."""

from __future__ import annotations

from pla_serve.policy.assemble import Assembler
from pla_serve.policy.book import RequestBook
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.pace import step_pace
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import (
    Batch,
    Capabilities,
    Decision,
    Idle,
    PrefillRequest,
    QueueState,
    Run,
    TenantLoad,
)
from pla_serve.policy.queues import PrefillQueue


class ContinuousBatching:
    """A `PrefillPolicy` without classes: one queue, mixed batches, nothing interrupted.

    Uses of `PolicyConfig`: ``max_batch_tokens``, ``max_batch_requests``, ``long_chunk_tokens`` (the
    cap of every request in a batch) and ``boundary_tokens`` (for metrics only). It ignores
    all other fields.
    """

    capabilities = Capabilities()

    def __init__(
        self,
        config: PolicyConfig,
        cost: CostModel,
        queue: PrefillQueue,
        book: RequestBook | None = None,
    ) -> None:
        self._queue = queue
        self._cost = cost
        self._book = book or RequestBook(config, cost, queue, queue)
        self._assembler = Assembler(self._book)
        self._running: tuple[Batch, float] | None = None

    def add(self, request: PrefillRequest, now: float) -> None:
        self._book.add(request)

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

    def next(self, now: float) -> Decision:
        batch = self._assembler.batch(self._queue, now)
        return Idle() if batch is None else self._start(batch, now)

    def at_layer_boundary(self, now: float, running: Batch) -> Batch | None:
        return None

    def observe(self, batch: Batch, seconds: float, now: float) -> None:
        self.dispatched(batch, now)
        self.measured(batch, seconds, now)

    def dispatched(self, batch: Batch, now: float) -> None:
        self._book.settle(batch, now)
        self._running = None

    def measured(self, batch: Batch, seconds: float, now: float) -> None:
        self._cost.observe(batch, seconds)
        self._book.renew_prices()

    def predicted_wait(
        self,
        new_tokens: int,
        history: int,
        now: float,
        deadline: float | None = None,
        *,
        bulk: bool = False,
    ) -> float:
        """The batch under way, what the queue puts first, and the decode steps that ride along."""
        book = self._book
        newcomer = book.probe(new_tokens, history, now, deadline, bulk=bulk)
        work = self._seconds_ahead(newcomer, now) + newcomer.seconds
        batches = 1 + work // max(book.full_batch_seconds(), 1e-9)
        return work + batches * book.step_seconds()

    def token_seconds(self, context: int, tpot: float, now: float) -> float:
        """Each step is one batch with the prefills that wait, as many as it holds."""
        book = self._book
        prefills = min(book.seconds(), book.full_batch_seconds())
        return prefills + step_pace(book.decodes, book.config, self._cost, context, tpot)

    def state(self, now: float) -> QueueState:
        return self._book.state()

    def load_of(self, tenant: str) -> TenantLoad:
        return self._book.load_of(tenant)

    def waits_as_short(self, new_tokens: int, history: int) -> bool:
        return self._book.is_short(new_tokens, history)

    def _start(self, batch: Batch, now: float) -> Run:
        self._running = (batch, now)
        return Run(batch)

    def _seconds_ahead(self, newcomer: Pending, now: float) -> float:
        """Predicted prefill work that goes before ``newcomer``."""
        total = self._book.seconds()
        return min(self._queue.seconds_ahead(newcomer, total) + self._rest(now), total)

    def _rest(self, now: float) -> float:
        """Predicted time until the batch under way is over."""
        if self._running is None:
            return 0.0
        batch, started = self._running
        return max(0.0, self._cost.seconds(batch) - (now - started))
