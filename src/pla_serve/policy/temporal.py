"""Prefill and decode take turns on one device, and never share a batch."""

from __future__ import annotations

from dataclasses import replace

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.decodes import DecodePool
from pla_serve.policy.pace import step_pace
from pla_serve.policy.protocol import (
    Batch,
    BatchClass,
    Decision,
    PrefillPolicy,
    PrefillRequest,
    QueueState,
    Run,
    TenantLoad,
)
from pla_serve.policy.tokens import coarse


class PrefillFirst:
    """PD temporal: another policy runs the prefills; decode steps run while it has none to run.

    What waits for a prefill is never held up by more than the decode step that runs, and decodes
    wait as long as there are prefills, without bound: that is the point of this arrangement, and
    the price of it. The inner policy never hears of decodes.

    From ``config`` it uses ``max_batch_tokens`` and ``max_batch_requests``, for its steps.
    """

    def __init__(self, inner: PrefillPolicy, config: PolicyConfig, cost: CostModel) -> None:
        self.capabilities = inner.capabilities
        self._inner = inner
        self._config = config
        self._cost = cost
        self._places = min(config.max_batch_requests, config.max_batch_tokens)
        self._decodes = DecodePool()
        self._step: tuple[float, float] | None = None
        """When the step that runs began, and its predicted seconds."""

    def add(self, request: PrefillRequest, now: float) -> None:
        self._decodes.discard(request.id)
        self._inner.add(request, now)

    def start_decode(
        self,
        request_id: str,
        context: int,
        arrival: float,
        now: float,
        tenant: str = "",
        tpot: float | None = None,
    ) -> None:
        self._inner.remove(request_id)
        self._decodes.start(request_id, context, now, tenant, coarse(tpot))

    def remove(self, request_id: str) -> None:
        self._inner.remove(request_id)
        self._decodes.discard(request_id)

    def next(self, now: float) -> Decision:
        decision = self._inner.next(now)
        if isinstance(decision, Run) or not self._decodes:
            return decision
        batch = Batch(BatchClass.DECODE, decodes=tuple(self._decodes.take(self._places)))
        self._step = (now, self._cost.seconds(batch))
        return Run(batch)

    def at_layer_boundary(self, now: float, running: Batch) -> Batch | None:
        if running.kind is BatchClass.DECODE:
            return None
        return self._inner.at_layer_boundary(now, running)

    def observe(self, batch: Batch, seconds: float, now: float) -> None:
        if batch.kind is not BatchClass.DECODE:
            self._inner.observe(batch, seconds, now)
            return
        self.dispatched(batch, now)
        self.measured(batch, seconds, now)

    def dispatched(self, batch: Batch, now: float) -> None:
        if batch.kind is not BatchClass.DECODE:
            self._inner.dispatched(batch, now)
            return
        self._step = None
        self._decodes.settle(batch.decodes, now)

    def measured(self, batch: Batch, seconds: float, now: float) -> None:
        if batch.kind is not BatchClass.DECODE:
            self._inner.measured(batch, seconds, now)
            return
        self._cost.observe(batch, seconds)

    def predicted_wait(
        self,
        new_tokens: int,
        history: int,
        now: float,
        deadline: float | None = None,
        *,
        bulk: bool = False,
    ) -> float:
        left = 0.0
        if self._step is not None:
            began, seconds = self._step
            left = max(0.0, began + seconds - now)
        return left + self._inner.predicted_wait(new_tokens, history, now, deadline, bulk=bulk)

    def token_seconds(self, context: int, tpot: float, now: float) -> float:
        """Every prefill that waits goes before the step."""
        step = step_pace(self._decodes, self._config, self._cost, context, tpot)
        return self._inner.state(now).seconds + step

    def state(self, now: float) -> QueueState:
        return replace(self._inner.state(now), decoding_requests=self._decodes.total)

    def load_of(self, tenant: str) -> TenantLoad:
        return self._inner.load_of(tenant)

    def waits_as_short(self, new_tokens: int, history: int) -> bool:
        return self._inner.waits_as_short(new_tokens, history)
