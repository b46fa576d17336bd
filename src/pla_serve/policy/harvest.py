"""Runs offline work in the time that online work leaves."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from pla_serve.policy.assemble import Assembler
from pla_serve.policy.book import RequestBook
from pla_serve.policy.chunking import long_chunk
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import (
    Batch,
    BatchClass,
    Capabilities,
    Decision,
    PrefillPolicy,
    PrefillRequest,
    QueueState,
    Run,
    ServiceLevel,
    TenantLoad,
    Wait,
)
from pla_serve.policy.queues import SortedQueue, arrival_rank
from pla_serve.policy.tuning import Tuning


class Harvesting:
    """Adds offline requests (`ServiceLevel.OFFLINE`) to a policy, which decides on all others.

    The policy is asked first. Only if it has nothing to run, or rests for longer than a layer is
    predicted to take, an offline batch runs. At each layer boundary of that batch the policy is
    asked again, and whatever it runs goes first. So the policy decides as it would without offline
    work, on requests that it hears of one layer later at most. Where a forward pass cannot be left,
    that is one offline batch.

    Offline batches mix decode steps and prefills as continuous batching does, first come, first
    served, with shares between tenants. They are so small that a layer is short (`chunking`).

    Offline work waits for as long as online work leaves no time. Whoever has to be done by some
    time adds its requests as online ones early enough.

    Args:
        online: the policy for all other requests.
    """

    def __init__(self, online: PrefillPolicy, config: PolicyConfig, cost: CostModel) -> None:
        self._online = online
        self._config = config
        self._cost = cost
        self._tuning = Tuning()
        self._queue = SortedQueue(arrival_rank)
        self._book = RequestBook(config, cost, self._queue, self._queue)
        self._assembler = Assembler(self._book)
        self._ids: set[str] = set()
        """It has the offline requests that wait, run or decode."""

    @property
    def capabilities(self) -> Capabilities:
        return self._online.capabilities

    def add(self, request: PrefillRequest, now: float) -> None:
        if request.service is ServiceLevel.OFFLINE:
            self._book.add(request)
            self._ids.add(request.id)
        else:
            self._online.add(request, now)

    def start_decode(
        self,
        request_id: str,
        context: int,
        arrival: float,
        now: float,
        tenant: str = "",
        tpot: float | None = None,
    ) -> None:
        if request_id in self._ids:
            self._book.start_decode(request_id, context, now, tenant)
        else:
            self._online.start_decode(request_id, context, arrival, now, tenant, tpot)

    def remove(self, request_id: str) -> None:
        if request_id in self._ids:
            self._ids.discard(request_id)
            self._book.remove(request_id)
        else:
            self._online.remove(request_id)

    def next(self, now: float) -> Decision:
        decision = self._online.next(now)
        if isinstance(decision, Run) or not self._waits:
            return decision
        left = decision.until - now if isinstance(decision, Wait) else inf
        found = self._harvest(now, left)
        return decision if found is None else Run(found)

    def at_layer_boundary(self, now: float, running: Batch) -> Batch | None:
        if running.kind is not BatchClass.OFFLINE:
            return self._online.at_layer_boundary(now, running)
        if not self._config.interruptible:
            return None
        decision = self._online.next(now)
        return decision.batch if isinstance(decision, Run) else None

    def observe(self, batch: Batch, seconds: float, now: float) -> None:
        self.dispatched(batch, now)
        self.measured(batch, seconds, now)

    def dispatched(self, batch: Batch, now: float) -> None:
        if batch.kind is BatchClass.OFFLINE:
            self._book.settle(batch, now)
        else:
            self._online.dispatched(batch, now)

    def measured(self, batch: Batch, seconds: float, now: float) -> None:
        if batch.kind is BatchClass.OFFLINE:
            self._cost.observe(batch, seconds)
            self._book.renew_prices()
        else:
            self._online.measured(batch, seconds, now)

    def predicted_wait(
        self,
        new_tokens: int,
        history: int,
        now: float,
        deadline: float | None = None,
        *,
        bulk: bool = False,
    ) -> float:
        """Predict without offline work, which adds a layer at most."""
        return self._online.predicted_wait(new_tokens, history, now, deadline, bulk=bulk)

    def token_seconds(self, context: int, tpot: float, now: float) -> float:
        return self._online.token_seconds(context, tpot, now)

    def state(self, now: float) -> QueueState:
        """Return the online work that waits: by offline work nobody is refused or sent away."""
        return self._online.state(now)

    def load_of(self, tenant: str) -> TenantLoad:
        return self._online.load_of(tenant)

    def waits_as_short(self, new_tokens: int, history: int) -> bool:
        return self._online.waits_as_short(new_tokens, history)

    @property
    def _waits(self) -> bool:
        """Whether an offline request is ready to run."""
        return bool(self._queue) or bool(self._book.decodes)

    def _harvest(self, now: float, left: float) -> Batch | None:
        """Return an offline batch that is predicted to be left in time, or None.

        Args:
            left: seconds until online work is due.
        """
        most = long_chunk(self._config, self._cost, self._tuning, 0, load=0.0)
        tokens = int(min(most, self._book.cap))
        if left < self._part(self._cost.prefill_seconds(tokens, 0)):
            return None
        batch = self._assembler.batch(self._queue, now, most_tokens=tokens)
        return None if batch is None else replace(batch, kind=BatchClass.OFFLINE)

    def _part(self, seconds: float) -> float:
        """Return the seconds of a batch during which it cannot be left."""
        config = self._config
        return seconds / config.layers if config.interruptible and config.layers else seconds
