"""A policy that decides at random, within the protocol: whatever it does, outputs must be right."""

from __future__ import annotations

from random import Random

from pla_serve.policy.protocol import (
    Batch,
    BatchClass,
    Chunk,
    Decision,
    Idle,
    PrefillRequest,
    QueueState,
    Run,
    TenantLoad,
    Wait,
)


class ChaosPolicy:
    """Random batches of random chunks, also at random layer boundaries, and random waits."""

    def __init__(self, seed: int, express: float = 0.3) -> None:
        self._random = Random(seed)
        self._express = express
        self._left: dict[str, tuple[int, int]] = {}
        self._decodes: dict[str, int] = {}
        self._flying: set[str] = set()
        self._dispatched: Batch | None = None

    def add(self, request: PrefillRequest, now: float) -> None:
        assert request.id not in self._flying
        assert request.new_tokens >= 1
        self._left[request.id] = (request.new_tokens, request.history)

    def start_decode(
        self,
        request_id: str,
        context: int,
        arrival: float,
        now: float,
        tenant: str = "",
        tpot: float | None = None,
    ) -> None:
        assert request_id not in self._left
        assert request_id not in self._decodes
        self._decodes[request_id] = context

    def remove(self, request_id: str) -> None:
        self._left.pop(request_id, None)
        self._decodes.pop(request_id, None)
        self._flying.discard(request_id)

    def next(self, now: float) -> Decision:
        if (self._left or self._decodes) and self._random.random() < 0.1:
            return Wait(now + 0.003)
        batch = self._pick()
        if batch is not None:
            return Run(batch)
        assert not self._left
        assert not self._decodes
        return Idle()

    def at_layer_boundary(self, now: float, running: Batch) -> Batch | None:
        chunks = (*running.prefills, *running.decodes)
        assert any(c.request_id in self._flying for c in chunks), "nobody waits for this batch"
        assert self._dispatched is None, "another batch runs"
        return self._pick() if self._random.random() < self._express else None

    def observe(self, batch: Batch, seconds: float, now: float) -> None:
        self.dispatched(batch, now)
        self.measured(batch, seconds, now)

    def measured(self, batch: Batch, seconds: float, now: float) -> None:
        assert seconds >= 0
        assert batch is self._dispatched
        self._dispatched = None

    def dispatched(self, batch: Batch, now: float) -> None:
        assert self._dispatched is None, "the one before it was not measured"
        self._dispatched = batch
        for chunk in batch.prefills:
            self._flying.discard(chunk.request_id)
            if chunk.request_id in self._left:
                new, history = self._left[chunk.request_id]
                assert history == chunk.history
                if chunk.completes:
                    assert new == chunk.tokens
                    del self._left[chunk.request_id]
                else:
                    self._left[chunk.request_id] = (new - chunk.tokens, history + chunk.tokens)
        for chunk in batch.decodes:
            self._flying.discard(chunk.request_id)
            if chunk.request_id in self._decodes:
                self._decodes[chunk.request_id] += 1

    def predicted_wait(
        self,
        new_tokens: int,
        history: int,
        now: float,
        deadline: float | None = None,
        *,
        bulk: bool = False,
    ) -> float:
        return 0.0

    def token_seconds(self, context: int, tpot: float, now: float) -> float:
        return 0.0

    def state(self, now: float) -> QueueState:
        return QueueState(len(self._left), 0, len(self._decodes), 0, 0, 0.0, 0.0)

    def load_of(self, tenant: str) -> TenantLoad:
        return TenantLoad(1, 0, 0.0)

    def waits_as_short(self, new_tokens: int, history: int) -> bool:
        return new_tokens <= 16

    def _pick(self) -> Batch | None:
        rng = self._random
        ready = [i for i in self._left if i not in self._flying]
        decoding = [i for i in self._decodes if i not in self._flying]
        if not ready and not decoding:
            return None
        total = len(ready) + len(decoding)
        chosen = set(rng.sample(sorted(ready + decoding), rng.randint(1, min(total, 5))))
        prefills = []
        for request_id in ready:
            if request_id in chosen:
                new, history = self._left[request_id]
                tokens = new if rng.random() < 0.4 else rng.randint(1, new)
                prefills.append(Chunk(request_id, tokens, history, tokens == new))
        decodes = tuple(Chunk(i, 1, self._decodes[i]) for i in decoding if i in chosen)
        self._flying |= chosen
        return Batch(BatchClass.MIXED, tuple(prefills), decodes)
