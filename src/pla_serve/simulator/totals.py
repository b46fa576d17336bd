"""Counters of one simulated instance."""

from __future__ import annotations

from dataclasses import dataclass

from pla_serve.simulator.instance import SimulatedInstance


@dataclass(slots=True)
class Totals:
    """Sums over all lives of an instance, or over several instances."""

    busy_seconds: float = 0.0
    computed_tokens: int = 0
    batches: int = 0
    express_batches: int = 0
    failures: int = 0

    def count(self, instance: SimulatedInstance) -> None:
        """Add one life of an instance."""
        self.busy_seconds += instance.busy_seconds
        self.computed_tokens += instance.computed_tokens
        self.batches += instance.batches
        self.express_batches += instance.express_batches

    def add(self, other: Totals) -> None:
        """Add another sum."""
        self.busy_seconds += other.busy_seconds
        self.computed_tokens += other.computed_tokens
        self.batches += other.batches
        self.express_batches += other.express_batches
        self.failures += other.failures
