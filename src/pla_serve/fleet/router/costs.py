"""Predicts the seconds of a prefill, and of a KV transfer, on the instances of this fleet."""

from __future__ import annotations

from dataclasses import astuple
from statistics import median

from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import Batch, BatchClass, Chunk

FRESH_SECONDS = 1.0
"""Shortest time between two updates of the model."""
FETCH_SECONDS = 0.01
"""Fixed seconds of a fetch: messages before KV begins to move, and until its end is confirmed."""
FIRST_BYTES_PER_SECOND = 1e9
"""Rate of KV transfers that is assumed before the first one; a modest network."""
LEARNING = 0.2
"""Weight of the newest transfer in the average rate."""


class FleetCost:
    """Cost model of the whole fleet: the median of the coefficients that instances report.

    If no instance reports any, the model is learned from first tokens. A fleet of unequal machines
    is predicted by its median machine; the queues that each instance reports, in its own seconds,
    correct that.
    """

    def __init__(self) -> None:
        self._said: dict[str, CostProfile] = {}
        self._boundaries: dict[str, int] = {}
        self._learnt = CostModel()
        self._model: CostModel | None = None
        self._made = -FRESH_SECONDS
        self._changed = False
        self.boundary_tokens = self._learnt.boundary()
        self.kv_bytes_per_token = 0
        self._bytes_per_second = FIRST_BYTES_PER_SECOND

    @property
    def launch_seconds(self) -> float:
        return self._current.profile.per_launch

    def prefill_seconds(self, new_tokens: int, history: int) -> float:
        """Return the predicted seconds of a prefill alone on an idle instance."""
        return self._current.prefill_seconds(new_tokens, history)

    def transfer_seconds(self, tokens: int) -> float:
        """Return the seconds to fetch the KV of so many tokens from another instance."""
        return FETCH_SECONDS + tokens * self.kv_bytes_per_token / self._bytes_per_second

    def fetched(self, tokens: int, seconds: float) -> None:
        """Learn from a fetch of so many tokens; ``seconds`` includes all that it waited for."""
        rate = tokens * self.kv_bytes_per_token / max(seconds - FETCH_SECONDS, 1e-4)
        if rate > 0:
            self._bytes_per_second += LEARNING * (rate - self._bytes_per_second)

    def said(self, name: str, cost: CostProfile | None, boundary_tokens: int, now: float) -> bool:
        """Note the cost model of an instance; return whether predictions have changed."""
        if boundary_tokens and self._boundaries.get(name) != boundary_tokens:
            self._boundaries[name] = boundary_tokens
            self._changed = True
        if cost is not None and self._said.get(name) != cost:
            self._said[name] = cost
            self._changed = True
        if not self._changed or now - self._made < FRESH_SECONDS:
            return False
        self._made, self._changed = now, False
        if self._said:
            columns = zip(*map(astuple, self._said.values()), strict=True)
            self._model = CostModel(CostProfile(*map(median, columns)))
        if self._boundaries:
            self.boundary_tokens = round(median(self._boundaries.values()))
        return True

    def gone(self, name: str) -> None:
        """Forget the model of an instance that was lost."""
        self._said.pop(name, None)
        self._boundaries.pop(name, None)
        self._changed = bool(self._said or self._boundaries)

    def saw(self, id: str, new_tokens: int, history: int, seconds: float) -> None:
        """Learn from the time from dispatch to first token of a request to an idle instance."""
        if not self._said:
            self._learnt.observe(
                Batch(BatchClass.MIXED, (Chunk(id, new_tokens, history),)), seconds
            )

    @property
    def _current(self) -> CostModel:
        return self._model if self._model is not None and self._said else self._learnt
