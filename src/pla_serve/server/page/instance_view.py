"""A view of one instance for its page: the last statistics of its engine."""

from __future__ import annotations

from typing import Any

import msgspec

from pla_serve.wire.engine import EngineReady, EngineStats


class InstancePageView:
    """Keeps the last message of each kind from the engine; an observer of the engine client."""

    def __init__(self) -> None:
        self._info: EngineReady | None = None
        self._stats: EngineStats | None = None
        self._restarts = 0
        self._last_loss: str | None = None

    @property
    def boundary_tokens(self) -> int:
        """L_m as last reported; 0 if it is not known."""
        return self._stats.load.boundary_tokens if self._stats else 0

    def describe(self) -> dict[str, Any]:
        """Return the state of the instance, JSON-ready."""
        info, stats = self._info, self._stats
        return {
            "kind": "instance",
            "engine": info
            and {
                "layers": info.layers,
                "kv_tokens": info.kv_tokens,
                "device": info.device,
                "dtype": info.dtype,
                "policy": info.policy,
            },
            "load": stats and _load(stats),
            "counters": stats
            and {
                "prompt_tokens": stats.prompt_tokens,
                "generation_tokens": stats.generation_tokens,
                "prefix_queries": stats.prefix_queries,
                "prefix_hits": stats.prefix_hits,
                "express_batches": stats.express_batches,
                "recompute_preemptions": stats.recompute_preemptions,
                "batches": stats.batches,
            },
            "restarts": self._restarts,
            "last_loss": self._last_loss,
        }

    # Events of the engine client

    def ready(self, info: EngineReady) -> None:
        """Keep the facts of a new life of the engine."""
        self._info = info
        self._stats = None

    def stats(self, stats: EngineStats) -> None:
        """Keep the newest statistics."""
        self._stats = stats

    def alive(self) -> None:
        """Do nothing: statistics say more."""

    def lost(self, reason: str) -> None:
        """Keep why the engine ended; what it said before holds no longer."""
        self._info = self._stats = None
        self._last_loss = reason

    def restarted(self) -> None:
        """Count a new process."""
        self._restarts += 1


def _load(stats: EngineStats) -> dict[str, Any]:
    load: dict[str, Any] = msgspec.to_builtins(stats.load)
    del load["cost"]
    return load
