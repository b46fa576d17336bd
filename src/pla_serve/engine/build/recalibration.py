"""Goes on with the warm-up while the engine is idle, after a start with a stored profile."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

import torch

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.build.stored_profile import ProfileStore
from pla_serve.engine.build.warm_up import WarmUpBatch, as_batch, shapes, time_batch
from pla_serve.engine.kv.manager import BlockTable, KVManager
from pla_serve.engine.run.executor import Executor
from pla_serve.engine.run.runner import PassAbandoned
from pla_serve.policy.cost import ALARM, CostModel

log = logging.getLogger(__name__)

LONGEST_LAYER_SECONDS = 0.05
"""Predicted time of one layer above which a batch of more than FEW_TOKENS is left out: a request
may have to wait for it."""
FEW_TOKENS = 16
"""Batches of so few new tokens always run, so that predictions that are too long are found out."""


class Recalibration:
    """Runs the small batches of a warm-up once each, and compares them with the stored profile.

    A batch takes KV blocks that nobody holds, and no other ones. It is left at the next layer
    boundary when a request has come, and run again when the engine is idle the next time. After the
    last batch the profile is stored again if its predictions were wrong by more than ALARM.

    Args:
        cost: the cost model with the stored profile. It learns what the batches take.
        chunk: tokens of a chunk of a long prefill.
        longest: most tokens of a sequence.
        layers: decoder layers of the model.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        executor: Executor,
        kv: KVManager,
        cost: CostModel,
        store: ProfileStore,
        *,
        chunk: int,
        longest: int,
        layers: int,
        clock: Callable[[], float],
    ) -> None:
        self._executor = executor
        self._kv = kv
        self._cost = cost
        self._stored = CostModel(cost.profile)
        self._store = store
        self._layers = layers
        self._clock = clock
        self._errors: list[float] = []
        self._left = deque(
            shape
            for shape in shapes(chunk)
            if all(sum(sequence) <= min(longest, max(chunk, 1024)) for sequence in shape)
        )

    @property
    def active(self) -> bool:
        """Whether batches are left to run."""
        return bool(self._left)

    def step(self, interrupted: Callable[[], bool]) -> bool:
        """Run one batch, if one is left. No request may be running.

        Returns whether batches are left.

        Args:
            interrupted: asked at each layer boundary. If it returns True, the batch is left there.
        """
        if not self._left:
            return False
        shape = self._left[0]
        tables = [BlockTable() for _ in shape]
        if self._is_quick(shape) and self._reserve(shape, tables):
            try:
                seconds = self._time(shape, tables, interrupted)
            except PassAbandoned:
                return True
            finally:
                for table in tables:
                    self._kv.release(table)
            self._learn(shape, seconds)
        self._left.popleft()
        if not self._left:
            self._end()
        return self.active

    def _is_quick(self, shape: WarmUpBatch) -> bool:
        """Return whether a request may wait for a layer of this batch."""
        layer = self._cost.seconds(as_batch(shape)) / self._layers
        return layer <= LONGEST_LAYER_SECONDS or sum(new for new, _ in shape) <= FEW_TOKENS

    def _learn(self, shape: WarmUpBatch, seconds: float) -> None:
        batch = as_batch(shape)
        if seconds > 0:
            self._errors.append(abs(self._stored.seconds(batch) / seconds - 1))
        self._cost.observe(batch, seconds)

    def _reserve(self, shape: WarmUpBatch, tables: Sequence[BlockTable]) -> bool:
        """Take blocks that nobody holds. Returns False, with none taken, if there are too few."""
        wanted = sum(self._kv.blocks_for(sum(sequence)) for sequence in shape)
        if wanted > self._kv.free:
            return False
        return all(
            self._kv.grow(table, sum(sequence))
            for table, sequence in zip(tables, shape, strict=True)
        )

    def _time(
        self, shape: WarmUpBatch, tables: Sequence[BlockTable], interrupted: Callable[[], bool]
    ) -> float:
        def at_boundary() -> None:
            if interrupted():
                raise PassAbandoned

        spans = [
            SpanRequest([0] * new, history, table.runs(), True)
            for (new, history), table in zip(shape, tables, strict=True)
        ]
        return time_batch(
            lambda requests: self._executor.forward(requests, at_boundary),
            spans,
            torch.device("cpu"),
            self._clock,
        )

    def _end(self) -> None:
        """Log what was found, and store the profile if it has changed."""
        error = median(self._errors) if self._errors else 0.0
        log.info(
            "the warm-up is over: %d batches differed from the stored cost profile by %.0f%%",
            len(self._errors),
            100 * error,
        )
        if error > ALARM:
            self._store.write(self._cost)
        if self._kv.free == self._kv.blocks:  # no request has left KV in the prefix cache
            self._executor.end_warm_up()
