"""Requests of a policy, with what is left of each. All policies share this module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.decodes import DecodePool
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import (
    Batch,
    Chunk,
    PrefillRequest,
    QueueState,
    ServiceLevel,
    TenantLoad,
)
from pla_serve.policy.queues import PrefillQueue, PrefillSource
from pla_serve.policy.tenants import TenantShares
from pla_serve.policy.tokens import coarse

SHARE_LAUNCHES = 8
"""Launch times of work that each tenant may have in the queues: with two tenants launches are then
at most a sixteenth of full batches."""
SHARE_TOKENS = 64
"""New tokens that each tenant may have there on a machine whose launches cost nothing."""


@dataclass(slots=True)
class Backlog:
    """Sums over unfinished prefills of one class; whole numbers, so that nothing drifts.

    A request in flight counts until its chunk is observed.
    """

    requests: int = 0
    tokens: int = 0
    twice_attention: int = 0
    twice_kv: int = 0
    launches: int = 0

    def change(self, sign: int, new_tokens: int, history: int, cap: int) -> None:
        """Add (``sign`` 1) or take away (-1) a prefill in chunks of ``cap`` tokens."""
        launches = -(-new_tokens // cap)
        self.requests += sign
        self.tokens += sign * new_tokens
        self.twice_attention += sign * new_tokens * (2 * history + new_tokens)
        self.twice_kv += sign * (2 * launches * history + new_tokens * (launches + 1))
        self.launches += sign * launches

    def seconds(self, cost: CostModel, launches: int) -> float:
        """Return the predicted seconds of all of it in so many batches."""
        return cost.work_seconds(
            self.tokens, self.twice_attention / 2, self.twice_kv / 2, self.launches, launches
        )


class Taken(NamedTuple):
    """Prefills handed out together."""

    chunks: list[Chunk]
    tokens: int
    shorts: int
    """Number of short prefills among the chunks."""
    twice_attention: int
    """Sum of tokens * (2 * history + tokens)."""
    history: int
    """Sum of the cached tokens before each chunk."""

    def seconds(self, cost: CostModel) -> float:
        """Predicted time of one batch of them."""
        kv, sequences = self.history + self.tokens, len(self.chunks)
        return cost.work_seconds(self.tokens, self.twice_attention / 2, kv, sequences, 1)


class RequestBook:
    """Keeps all requests of a policy while they wait, run and decode; its queues order them.

    While several tenants have unfinished prefills, `TenantShares` decides which of them are in the
    queues. The classes have accounts of their own if their queues take turns by themselves.

    Args:
        shorts, longs: where prefills of either class wait; one queue may be both.
        one_account: tenants share the time of both classes together. For a policy that puts one
            class before the other without bound, or has a single queue.
    """

    def __init__(
        self,
        config: PolicyConfig,
        cost: CostModel,
        shorts: PrefillQueue,
        longs: PrefillQueue,
        *,
        one_account: bool = False,
    ) -> None:
        self.config = config
        self.cost = cost
        self.cap = config.max_chunk_tokens
        """Most tokens of one request in one batch."""
        self.decodes = DecodePool()
        self.short_backlog = Backlog()
        self.long_backlog = Backlog()
        self._queues = (longs, shorts)
        self._pending: dict[str, Pending] = {}
        self._flying: set[str] = set()
        self._adds = 0
        self._epoch = cost.epoch
        self._loads: dict[str, Backlog] = {}
        self.short_loads: dict[str, Backlog] = {}
        """Unfinished short prefills of each tenant that has some."""
        if one_account or shorts is longs:
            queues = {False: longs} if shorts is longs else {False: longs, True: shorts}
            shares = self._make_shares(queues, lambda request: True)
            self._shares = (shares, shares)
        else:
            self._shares = (
                self._make_shares({False: longs}, lambda request: not request.short),
                self._make_shares({False: shorts}, lambda request: request.short),
            )

    def is_short(self, new_tokens: int, history: int) -> bool:
        """The class of a prefill."""
        return new_tokens <= self.boundary(history)

    def boundary(self, history: int) -> int:
        """L_m: given by the settings, or by the cost model."""
        given = self.config.boundary_tokens
        return self.cost.boundary(history) if given is None else given

    def get(self, request_id: str) -> Pending | None:
        """The unfinished prefill of this id."""
        return self._pending.get(request_id)

    def probe(
        self,
        new_tokens: int,
        history: int,
        now: float,
        deadline: float | None = None,
        *,
        bulk: bool = False,
    ) -> Pending:
        """Return a request as if it arrived now, to compare with queued ones; it is not kept."""
        service = ServiceLevel.BULK if bulk else ServiceLevel.USUAL
        request = PrefillRequest("", now, new_tokens, history, deadline, service=service)
        pending = self._make(request, self._adds + 1)
        pending.late = deadline is not None and now + pending.seconds > deadline
        return pending

    def add(self, request: PrefillRequest) -> Pending:
        """Queue a request, or replace the numbers of one that waits or decodes.

        Raises:
            ValueError: it has nothing to compute, or a chunk of it is in flight.
        """
        if request.new_tokens < 1 or request.history < 0:
            raise ValueError(
                f"request {request.id!r} needs new_tokens of at least 1 and history of at least 0, "
                f"not {request.new_tokens} and {request.history}"
            )
        if request.id in self._flying:
            raise ValueError(f"request {request.id!r} is in flight: observe or remove it first")
        known = self._pending.get(request.id)
        self.remove(request.id)
        self._adds += 1
        pending = self._make(request, known.order if known else self._adds)
        self._pending[request.id] = pending
        self._count(pending, 1)
        self._shares[pending.short].add(pending)
        return pending

    def start_decode(
        self,
        request_id: str,
        context: int,
        now: float,
        tenant: str = "",
        tpot: float | None = None,
    ) -> None:
        """Let a request whose prefill is complete take its turn at decode steps.

        Its target ``tpot`` is rounded down; see `tokens.coarse`.
        """
        self.remove(request_id)
        self.decodes.start(request_id, context, now, tenant, coarse(tpot))

    def remove(self, request_id: str) -> None:
        """Forget a request in whatever state it is."""
        pending = self._pending.pop(request_id, None)
        if pending is None:
            self.decodes.discard(request_id)
            return
        self._count(pending, -1)
        self._flying.discard(request_id)
        shares = self._shares[pending.short]
        shares.remove(pending)
        shares.release()

    def take(
        self, queue: PrefillSource, places: int, tokens: int, now: float, each: int | None = None
    ) -> Taken:
        """Hand out prefills in the queue's order until ``places`` or ``tokens`` are used up.

        No request gets more than ``cap`` tokens, and no tenant more than ``each``; the last request
        may get a part. Who comes after its tenant has got them waits on.
        """
        chunks: list[Chunk] = []
        shorts, left, twice_attention, cached = 0, tokens, 0, 0
        if places <= 0 or tokens <= 0:
            return Taken(chunks, 0, 0, 0, 0)
        parts: dict[str, int] = {}
        passed: list[Pending] = []
        for pending in queue.drain(now):
            chunk, count = pending.whole, pending.new_tokens
            most = left if each is None else min(left, parts.get(pending.tenant, each))
            if most == 0:
                passed.append(pending)
                continue
            if chunk is None or count > most:
                count = min(count, self.cap, most)
                chunk = Chunk(pending.id, count, pending.history, count == pending.new_tokens)
            pending.flight = chunk
            shorts += pending.short
            history = pending.history
            cached += history
            twice_attention += count * (2 * history + count)
            left -= count
            if each is not None:
                parts[pending.tenant] = parts.get(pending.tenant, each) - count
            chunks.append(chunk)
            places -= 1
            if left == 0 or places == 0:
                break
        for pending in passed:
            self._queues[pending.short].push(pending)
        self._flying.update([chunk[0] for chunk in chunks])
        return Taken(chunks, tokens - left, shorts, twice_attention, cached)

    def hand_out(self, pending: Pending, tokens: int) -> Chunk:
        """Hand out the next ``tokens`` tokens of a prefill that its queue has let go."""
        chunk = Chunk(pending.id, tokens, pending.history, tokens == pending.new_tokens)
        pending.flight = chunk
        self._flying.add(pending.id)
        return chunk

    def settle(self, batch: Batch, now: float) -> None:
        """Note that ``batch`` has run until ``now``. What is left of its prefills waits again.

        Raises:
            ValueError: a chunk differs from the one that was handed out for its request.
        """
        self.decodes.settle(batch.decodes, now)
        for chunk in batch.prefills:
            pending = self._pending.get(chunk.request_id)
            if pending is None or pending.flight is None:
                continue  # removed meanwhile, perhaps added anew
            if pending.flight != chunk:
                raise ValueError(f"{chunk} was observed, but {pending.flight} was handed out")
            self._settle(pending, chunk)
        for shares in self._shares:
            shares.release()

    def _settle(self, pending: Pending, chunk: Chunk) -> None:
        """``chunk`` of ``pending`` was computed."""
        self._flying.discard(pending.id)
        self._count(pending, -1)
        before = pending.seconds
        pending.new_tokens -= chunk.tokens
        pending.history += chunk.tokens
        pending.flight = None
        shares = self._shares[pending.short]
        if pending.new_tokens == 0:
            del self._pending[pending.id]
            shares.served(pending, before)
            return
        pending.started = True
        self._price(pending)
        self._count(pending, 1)
        shares.served(pending, before - pending.seconds)
        self._queues[pending.short].push(pending)

    def renew_prices(self) -> None:
        """Sort the queues again if the cost model has moved far; rare, O(n log n) when it has."""
        if self._epoch == self.cost.epoch:
            return
        self._epoch = self.cost.epoch
        for pending in self._pending.values():
            self._price(pending)
        for queue in {id(queue): queue for queue in self._queues}.values():
            queue.resort()

    def seconds(self) -> float:
        """Predicted time to finish every prefill, in flight or not."""
        return self.short_seconds() + self.long_seconds()

    def short_seconds(self) -> float:
        """Predicted time to finish every short prefill, packed into full batches."""
        backlog, config = self.short_backlog, self.config
        batches = max(
            -(-backlog.tokens // config.max_batch_tokens),
            -(-backlog.requests // config.max_batch_requests),
        )
        return backlog.seconds(self.cost, batches)

    def long_seconds(self) -> float:
        """Predicted time to finish every long prefill, chunk by chunk."""
        return self.long_backlog.seconds(self.cost, self.long_backlog.launches)

    def full_batch_seconds(self) -> float:
        """Predicted time of a prefill batch that is full."""
        return self.cost.prefill_seconds(self.config.max_batch_tokens, 0)

    def step_seconds(self) -> float:
        """Predicted time of a decode step of those who are ready, as many as a batch takes."""
        config, count = self.config, len(self.decodes)
        count = min(count, config.max_batch_requests, config.max_batch_tokens)
        context = self.decodes.mean_context
        return self.cost.work_seconds(count, count * context, count * (context + 1), count, 1)

    def state(self) -> QueueState:
        """State of the queues. Requests in a running batch count in the seconds only."""
        requests = [self.long_backlog.requests, self.short_backlog.requests]
        tokens = [self.long_backlog.tokens, self.short_backlog.tokens]
        for request_id in self._flying:
            pending = self._pending[request_id]
            requests[pending.short] -= 1
            tokens[pending.short] -= pending.new_tokens
        return QueueState(
            short_requests=requests[True],
            long_requests=requests[False],
            decoding_requests=self.decodes.total,
            short_tokens=tokens[True],
            long_tokens=tokens[False],
            seconds=self.seconds(),
            short_seconds=self.short_seconds(),
        )

    def load_of(self, tenant: str) -> TenantLoad:
        """Unfinished prefills of one tenant."""
        load = self._loads.get(tenant)
        if load is None:
            return TenantLoad(len(self._loads) + 1, 0, 0.0)
        return TenantLoad(len(self._loads), load.tokens, load.seconds(self.cost, load.launches))

    def _all(self) -> Iterable[Pending]:
        return self._pending.values()

    def _make_shares(
        self, queues: dict[bool, PrefillQueue], mine: Callable[[Pending], bool]
    ) -> TenantShares:
        return TenantShares(
            queues,
            window=self._share_window,
            price=self._marginal_seconds,
            flying=lambda: filter(mine, map(self._pending.__getitem__, self._flying)),
        )

    def _share_window(self) -> float:
        """How far tenants may be apart: so much that launches are a small part of a batch that is
        filled with it, and at least a short prompt."""
        return max(
            SHARE_LAUNCHES * self.cost.profile.per_launch,
            self.cost.prefill_seconds(SHARE_TOKENS, 0),
        )

    def _marginal_seconds(self, request: Pending) -> float:
        """Predicted seconds of a prefill in a launch that it shares."""
        tokens, history = request.new_tokens, request.history
        return self.cost.work_seconds(
            tokens, tokens * (history + tokens / 2), history + tokens, 1, 0
        )

    def _make(self, request: PrefillRequest, order: int) -> Pending:
        bulk = request.service.unhurried
        pending = Pending(
            request.id,
            request.arrival,
            request.deadline,
            request.priority,
            order,
            request.new_tokens,
            request.history,
            not bulk and self.is_short(request.new_tokens, request.history),
            0.0,
            None,
            tenant=request.tenant,
            bulk=bulk,
        )
        self._price(pending)
        return pending

    def _price(self, pending: Pending) -> None:
        cap, tokens = self.cap, pending.new_tokens
        pending.seconds = self.cost.epoch_prefill_seconds(tokens, pending.history, cap)
        pending.whole = Chunk(pending.id, tokens, pending.history) if tokens <= cap else None

    def _count(self, pending: Pending, sign: int) -> None:
        backlog = self.short_backlog if pending.short else self.long_backlog
        backlog.change(sign, pending.new_tokens, pending.history, self.cap)
        for loads in (self._loads, self.short_loads) if pending.short else (self._loads,):
            load = loads.get(pending.tenant)
            if load is None:
                load = loads[pending.tenant] = Backlog()
            load.change(sign, pending.new_tokens, pending.history, self.cap)
            if not load.requests:
                del loads[pending.tenant]
